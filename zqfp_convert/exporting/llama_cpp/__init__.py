"""GGUF, the file of llama.cpp, by way of the package `gguf`; nothing else imports that package."""
