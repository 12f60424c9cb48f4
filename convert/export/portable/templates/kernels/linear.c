/* Classifier: logits from sums of input * weight over all bytes. */
static void net_linear(int32_t classes, int32_t values, const int8_t *weight, const int32_t *multiplier,
                       const int64_t *offset, const uint8_t *shift, const uint8_t *input, int32_t *logits)
{
    int32_t logit, value;

    for (logit = 0; logit < classes; logit++) {
        int32_t sum = 0;
        int64_t total;

        for (value = 0; value < values; value++)
            sum += (int32_t)input[value] * *weight++;
        total = (int64_t)sum * multiplier[logit] + offset[logit];
        /* Round down: shifts of negative numbers are implementation-defined, so shift -1 - total instead. */
        if (total < 0)
            logits[logit] = (int32_t)(-1 - ((-1 - total) >> shift[logit]));
        else
            logits[logit] = (int32_t)(total >> shift[logit]);
    }
}
