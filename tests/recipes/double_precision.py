"""Networks in fp64, for runs that are compared: sharp gradients make 0.05 of rounding of 1e-6 in 20 steps.

Loaded by its path, since the scripts of this folder start as programs of their own.
"""


def in_double(build):
    """What builds the same network in fp64, given images of fp32."""

    def built(*arguments, **options):
        model = build(*arguments, **options).double()
        model.register_forward_pre_hook(lambda module, images: (images[0].double(),))
        return model

    return built
