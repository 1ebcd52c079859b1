"""Does a language model that an attack made collapse heal under clean fine-tuning?"""

__version__ = "0.1.0"
