"""Engines that run exports: llama.cpp and vLLM."""
