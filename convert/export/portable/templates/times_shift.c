typedef int8_t net_factor;

/* Multiply by a power of two: the factor k + 1 stands for 2^k, -(k + 1) for -2^k, 0 for 0. Only absolute values are
 * shifted, since left shifts of negative numbers are undefined. */
static int64_t net_times(int32_t value, net_factor factor)
{
    int64_t size = value < 0 ? -(int64_t)value : value;

    if (factor == 0)
        return 0;
    size <<= factor < 0 ? -factor - 1 : factor - 1;
    return (value < 0) == (factor < 0) ? size : -size;
}
