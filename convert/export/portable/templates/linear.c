/* The classifier: sums of input * weight over all bytes to logits. */
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
        /* Rounded down: a shift of a negative number is left to the compiler, so what is shifted is -1 - total. */
        if (total < 0)
            logits[logit] = (int32_t)(-1 - ((-1 - total) >> shift[logit]));
        else
            logits[logit] = (int32_t)(total >> shift[logit]);
    }
}
