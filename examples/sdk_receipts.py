"""Our own client: where did the model hesitate, and what did the correction make of it?

    TRIMTAB_BASE_URL=http://127.0.0.1:8000/v1 python sdk_receipts.py

`trimtab chat --compare` shows the same in colours.
"""

from trimtab import Client
from trimtab.clients import Steering

with Client() as client:
    correction = next(model for model in client.models() if model.parent)
    steering = Steering(correction.id, report="tokens")
    with client.stream_chat("Write one short sentence about the sea.", steering=steering, max_tokens=40) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)

    unsure = sorted(stream.receipts, key=lambda receipt: receipt.entropy, reverse=True)[:3]
    print("\n\nwhere the model was least sure:")
    for receipt in unsure:
        print(f"  {receipt.entropy:.2f} nats before {receipt.token!r}")
    print("what the correction put first instead:")
    for receipt in stream.receipts:
        if receipt.flip:
            print(f"  {receipt.base_token!r} -> {receipt.steered_token!r}")
    print(stream.steering)
