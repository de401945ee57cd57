r"""Fine-tune the decoder of a VAE on noisy codes, so that a flow's samples need no denoising.

A flow of one noise level t models codes + t * noise, and its samples are as noisy. The plain decoder makes spots of
the noise; one that has learnt to decode noisy codes gives clean images at once. The encoder stays as it is, and so do
the codes: flows trained on them need not know.

    accelerate launch vae/finetune_decoder.py /data/imagenet decoder/ --vae stabilityai/sd-vae-ft-ema \
        --size 256 --t-max 0.3 --train.mixed-precision bf16 --loss.lpips 1

One decoder for a range of noise levels: --t-min 0.1 --t-max 0.5. Faster: --crop-size 128.
The losses of pixels alone, which are the default, give the highest PSNR, but blurred images; --loss.lpips 1 and, once
that has settled, --loss.adversarial 0.1 --loss.adversarial-start 5000 give sharper ones.

OUT/vae is the VAE with its new decoder: AutoencoderKL.from_pretrained("OUT/vae"), or of its class in diffusers.
OUT/psnr.json has the PSNR of decoded held-out images before and after, OUT/comparison.png shows some of them, and
OUT/metrics.jsonl has the curves: itarflow plot OUT. Ctrl-C saves a state; the same command with --resume goes on.
"""

from itarflow.commands.finetune_decoder import main

if __name__ == "__main__":
    main(__doc__)
