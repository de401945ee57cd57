"""Between 8-bit pixels and the values that a flow models: pixels in [-1, 1], or the codes of an autoencoder.

Codes are the latents of a VAE, shifted and scaled to about unit variance as its config says, with the noise level in
their units. Pixel space is the codec that changes nothing.
"""

from itarflow.codec.codec import Codec, PixelCodec, Posterior, VaeCodec, codec_of, stored_codes
from itarflow.codec.identity import VaeIdentity, check_same_codes, differing, own_scaling, vae_identity
from itarflow.codec.kinds import Vae, VaeTraits, code_shape, image_shape, vae_traits
from itarflow.codec.load import CodecConfig, load_vae
from itarflow.codec.pixels import to_pil, to_pixels, to_uint8

__all__ = [
    "Codec", "CodecConfig", "PixelCodec", "Posterior", "Vae", "VaeCodec", "VaeIdentity", "VaeTraits",
    "check_same_codes", "code_shape", "codec_of", "differing", "image_shape", "load_vae", "own_scaling",
    "stored_codes", "to_pil", "to_pixels", "to_uint8", "vae_identity", "vae_traits",
]  # fmt: skip
