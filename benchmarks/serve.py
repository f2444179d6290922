"""`xformer serve` under several clients: questions per second, and the median and 95th percentile of their latency.

    python benchmarks/serve.py [--clients 1 4 16] [--requests 400] [--model FOLDER] [--output FILE.md]

Starts the server twice, with batches (`--max-batch 16`) and one by one (`--max-batch 1`), each on one thread. Every client
sends a question about a scene, waits for the answer and sends the next one; each question is asked of both servers. The
rounds of the two servers alternate; the table has the medians over rounds. Answers are checked to be equal, up to what
bf16 rounds in another batch; the share of equal ones is shown.
"""

import argparse
import asyncio
import base64
import io
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from full_size import machine

from xformer_mllm.embedded.scenes import SceneQuestions

SERVERS = {"batched": 16, "one by one": 1}


def bodies(count: int, name: str) -> list[dict]:
    """Requests, four questions about each scene."""
    data, found = SceneQuestions("validation", -(-count // 4), questions_per_scene=4), []
    for number in range(count):
        row, file = data[number], io.BytesIO()
        row["image"].save(file, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
        found.append({"model": name, "messages": [{"role": "user", "content": parts}], "max_tokens": 8})
    return found


async def ask_all(url: str, requests: Sequence[dict], clients: int) -> tuple[float, list[float], list[str]]:
    """(seconds in all, seconds of each request, answers)."""
    seconds, answers, waiting = [0.0] * len(requests), [""] * len(requests), iter(range(len(requests)))

    async def one_client() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            for number in waiting:
                began = time.perf_counter()
                answer = await client.post(f"{url}/v1/chat/completions", json=requests[number])
                seconds[number] = time.perf_counter() - began
                answers[number] = answer.json()["choices"][0]["message"]["content"]

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    return time.perf_counter() - began, seconds, answers


def start(max_batch: int, model: Path | None) -> tuple[subprocess.Popen, str]:
    """A server of its own process, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "serve",
        *([str(model)] if model else []),
        "--no-page",
        "--port",
        str(port),
        "--max-batch",
        str(max_batch),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "xformer_mllm", *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return process, url
        except httpx.TransportError:
            if process.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    servers = {name: start(size, arguments.model) for name, size in SERVERS.items()}
    try:
        lines = measure({name: url for name, (_, url) in servers.items()}, arguments)
    finally:
        for process, _ in servers.values():
            process.terminate()
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


def measure(urls: dict[str, str], arguments: argparse.Namespace) -> list[str]:
    name = httpx.get(f"{next(iter(urls.values()))}/v1/models").json()["data"][0]["id"]
    requests = bodies(arguments.requests, name)
    for url in urls.values():
        asyncio.run(ask_all(url, requests[:8], 1))
    lines = ["| clients | server | questions/s | p50, ms | p95, ms | equal answers |", "|---|---|---|---|---|---|"]
    for clients in arguments.clients:
        found: dict[str, list[tuple[float, list[float], list[str]]]] = {server: [] for server in urls}
        for _ in range(arguments.rounds):
            for server, url in urls.items():
                found[server].append(asyncio.run(ask_all(url, requests, clients)))
        reference = found["one by one"][0][2]
        for server, rounds in found.items():
            rate = statistics.median(len(requests) / total for total, _, _ in rounds)
            parts = [statistics.quantiles(seconds, n=20) for _, seconds, _ in rounds]
            p50, p95 = (1000 * statistics.median(part[place] for part in parts) for place in (9, 18))
            same = sum(a == b for a, b in zip(rounds[-1][2], reference, strict=True)) / len(reference)
            lines.append(f"| {clients} | {server} | {rate:.1f} | {p50:.0f} | {p95:.0f} | {same:.3f} |")
    return [*lines, "", f"{machine()}, one thread; {len(requests)} questions, {arguments.rounds} rounds."]


if __name__ == "__main__":
    main()
