"""Open StyleGAN2 and StyleGAN3 checkpoint files and rebuild their networks; nothing in a file is executed."""
