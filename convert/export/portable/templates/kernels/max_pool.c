/* Max-pooling: the largest byte of each window, ignoring padded taps. */
static void net_max_pool(const net_window *window, int32_t channels, const uint8_t *input, uint8_t *output)
{
    net_position at;
    int32_t taps, tap, channel;

    net_start(&at, window, input, NULL);
    while ((taps = net_slide(&at)) > 0)
        for (channel = 0; channel < channels; channel++) {
            uint8_t largest = 0;

            for (tap = 0; tap < taps; tap++)
                if (at.taps[tap] != NULL && at.taps[tap][channel] > largest)
                    largest = at.taps[tap][channel];
            *output++ = largest;
        }
}
