"""The op library and pickling support, under the names that pickles of the StyleGAN family import."""
