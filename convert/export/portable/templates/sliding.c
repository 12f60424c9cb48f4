/* Position of a sliding window, and the pixels under it. */
typedef struct {
    const net_window *window;
    const uint8_t *input;
    const uint8_t *outside;  /* the pixel that padded taps read */
    int32_t y, x, top, left; /* of the next window */
    const uint8_t *taps[NET_MOST_TAPS];
} net_position;

static void net_start(net_position *at, const net_window *window, const uint8_t *input, const uint8_t *outside)
{
    at->window = window;
    at->input = input;
    at->outside = outside;
    at->y = 0;
    at->x = 0;
    at->top = window->top;
    at->left = window->left;
}

/* Fill the taps of the next window, row by row. Return their number, 0 after the last window. */
static int32_t net_slide(net_position *at)
{
    const net_window *window = at->window;
    int32_t count = 0, i, j, row, column;

    if (at->x == window->out_width) {
        at->x = 0;
        at->left = window->left;
        at->y++;
        at->top += window->down;
    }
    if (at->y == window->out_height)
        return 0;
    for (i = 0, row = at->top; i < window->rows; i++, row += window->below)
        for (j = 0, column = at->left; j < window->columns; j++, column += window->beside) {
            int inside = row >= 0 && row < window->size && column >= 0 && column < window->line;
            at->taps[count++] = inside ? at->input + row + column : at->outside;
        }
    at->x++;
    at->left += window->right;
    return count;
}
