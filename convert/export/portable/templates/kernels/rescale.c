/* Element-wise step: bytes to bytes, with or without a residual. */
static void net_rescale(int32_t pixels, int32_t channels, const net_requantization *to, const uint8_t *input,
                        const uint8_t *residual, uint8_t *output)
{
    int32_t pixel, channel;

    for (pixel = 0; pixel < pixels; pixel++)
        for (channel = 0; channel < channels; channel++)
            *output++ = net_requantize(to, channel, *input++, residual != NULL ? *residual++ : 0);
}
