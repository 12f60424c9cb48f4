typedef int32_t net_factor;

static int64_t net_times(int32_t value, net_factor factor)
{
    return (int64_t)value * factor;
}
