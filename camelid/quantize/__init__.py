"""Weights into int8 and int4: to nearest or by GPTQ, and what it costs, measured."""
