/* Average pooling without padding: sums of each window, which the requantization divides. */
static void net_average_pool(const net_window *window, int32_t channels, const net_requantization *to,
                             const uint8_t *input, const uint8_t *residual, uint8_t *output)
{
    int32_t y, x, channel, i, j, top, left, row, column;

    for (y = 0, top = 0; y < window->out_height; y++, top += window->down)
        for (x = 0, left = top; x < window->out_width; x++, left += window->right)
            for (channel = 0; channel < channels; channel++) {
                int32_t sum = 0;

                for (i = 0, row = left + channel; i < window->rows; i++, row += window->below)
                    for (j = 0, column = row; j < window->columns; j++, column += window->beside)
                        sum += input[column];
                *output++ = net_requantize(to, channel, sum, residual != NULL ? *residual++ : 0);
            }
}
