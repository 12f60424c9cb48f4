/* A kernel's windows over bytes [height][width][channels]. All distances are in bytes of the input, so that no address
 * needs a multiplication. */
typedef struct {
    int32_t size, line;             /* the whole input, one of its rows */
    int32_t out_height, out_width;  /* number of windows */
    int32_t rows, columns;          /* taps of a window */
    int32_t top, left;              /* where the first window begins: the padding, with a minus */
    int32_t down, right;            /* from a window to the next one */
    int32_t below, beside;          /* from a tap to the next one */
} net_window;
