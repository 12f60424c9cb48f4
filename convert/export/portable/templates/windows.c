/* Sliding windows over bytes [height][width][channels]. All distances are in bytes of the input, so that addresses need
 * no multiplication. */
typedef struct {
    int32_t size, line;             /* of the whole input, and of one row */
    int32_t out_height, out_width;  /* number of windows */
    int32_t rows, columns;          /* taps of a window */
    int32_t top, left;              /* start of the first window: minus the padding */
    int32_t down, right;            /* from one window to the next */
    int32_t below, beside;          /* from one tap to the next */
} net_window;
