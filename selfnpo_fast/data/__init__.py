"""What a run learns from: prompts, captioned images, and stores of their encoded latents."""
