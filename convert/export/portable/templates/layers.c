/* Adder layers and convolutions; weights are [groups][filters][taps][channels]. */
typedef struct {
    net_window window;
    int32_t groups, filters, channels; /* number of groups; filters and channels of each group */
    const uint8_t *zero_point;         /* the padded pixel; a null pointer without padding */
} net_layer;
