int main(void)
{
    static output_type output[NET_OUTPUTS];
    long i, j, wrong = 0;

    for (i = 0; i < IMAGES; i++) {
        net_run(images[i], output);
        for (j = 0; j < NET_OUTPUTS; j++)
            if (output[j] != expected[i][j]) {
                if (wrong++ < 10)
                    printf("image %ld, output %ld: %ld, expected %ld\n", i, j, (long)output[j], (long)expected[i][j]);
            }
    }
    printf("%d images, %ld outputs differ\n", IMAGES, wrong);
    return wrong != 0;
}
