"""Calls that mypy checks with the packages: a comment that ignores an error is itself an error where there is none."""

from __future__ import annotations

from typing_extensions import assert_type

from glm_image_client import AsyncGlmImageClient, GenerationResult, GlmImageClient, PriorTokens, RemotePipeline


def blocking(client: GlmImageClient, prior: PriorTokens) -> None:
    assert_type(client.generate("a fox", num_inference_steps=20, images="fox.png"), GenerationResult)
    assert_type(client.generate(["a fox", "a hen"], seed=3), list[GenerationResult])
    client.stream("a fox", preview_every=5, image=["fox.png", b"file"])
    client.generate("a fox", steps=20)  # type: ignore[call-overload]
    client.generate(["a fox"], steps=20)  # type: ignore[call-overload]
    client.generate("a fox", preview_every=5)  # type: ignore[call-overload]
    client.stream("a fox", steps=20)  # type: ignore[call-arg]
    client.stream("a fox", seed="3")  # type: ignore[arg-type]
    client.stream(["a fox"])  # type: ignore[arg-type]
    client.prior_tokens("a fox", num_inference_steps=20)  # type: ignore[call-arg]
    client.paint("a fox", prior, width=64)  # type: ignore[call-arg]


async def asynchronous(client: AsyncGlmImageClient, prior: PriorTokens) -> None:
    assert_type(await client.generate("a fox", num_inference_steps=20), GenerationResult)
    assert_type(await client.generate(("a fox", "a hen")), list[GenerationResult])
    await client.generate("a fox", steps=20)  # type: ignore[call-overload]
    client.stream("a fox", steps=20)  # type: ignore[call-arg]
    await client.prior_tokens("a fox", num_inference_steps=20)  # type: ignore[call-arg]
    await client.paint("a fox", prior, width=64)  # type: ignore[call-arg]


def pipeline(pipe: RemotePipeline) -> None:
    pipe("a fox", num_images_per_prompt=2, generator=[1, 2])
    pipe("a fox", generator="7")  # type: ignore[arg-type]
