/* One entry for each output channel. */
typedef struct {
    const net_factor *multiplier;
    const int64_t *offset;
    const uint8_t *shift;
    const uint8_t *scale_exponent;
    const net_factor *residual_multiplier; /* a null pointer without a residual */
    int32_t quant_max;                     /* the largest code */
} net_requantization;

/* Turn a sum, and the residual's byte, into the byte of a channel; a negative total becomes 0 before it is shifted. */
static uint8_t net_requantize(const net_requantization *to, int32_t channel, int32_t sum, int32_t residual)
{
    int64_t total = net_times(sum, to->multiplier[channel]) + to->offset[channel];

    if (to->residual_multiplier != NULL)
        total += net_times(residual, to->residual_multiplier[channel]);
    if (total < 0)
        return 0;
    total >>= to->shift[channel];
    if (total > to->quant_max)
        total = to->quant_max;
    return (uint8_t)(total << to->scale_exponent[channel]);
}
