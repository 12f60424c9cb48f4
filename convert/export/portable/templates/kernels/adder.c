/* Adder layer: sums of |input - weight|. */
static void net_adder(const net_layer *layer, const uint8_t *weights, const net_requantization *to,
                      const uint8_t *input, const uint8_t *residual, uint8_t *output)
{
    net_position at;
    int32_t taps, group, filter, tap, channel, first, written;

    net_start(&at, &layer->window, input, layer->zero_point);
    while ((taps = net_slide(&at)) > 0) {
        const uint8_t *weight = weights;

        written = 0;
        for (group = 0, first = 0; group < layer->groups; group++, first += layer->channels)
            for (filter = 0; filter < layer->filters; filter++) {
                int32_t sum = 0;

                for (tap = 0; tap < taps; tap++) {
                    const uint8_t *pixel = at.taps[tap] + first;

                    for (channel = 0; channel < layer->channels; channel++) {
                        int32_t difference = (int32_t)pixel[channel] - *weight++;

                        sum += difference < 0 ? -difference : difference;
                    }
                }
                *output++ = net_requantize(to, written++, sum, residual != NULL ? *residual++ : 0);
            }
    }
}
