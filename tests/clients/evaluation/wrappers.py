"""Asks as swallow-evaluation-instruct does through litellm, and as llm-jp-eval does through langchain; prints JSON.

    python wrappers.py http://127.0.0.1:8000 QUESTION
"""

import json
import sys

import litellm
from langchain_openai import ChatOpenAI


def main(url: str, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    many = litellm.completion(
        model="hosted_vllm/tiny",
        api_base=f"{url}/v1",
        api_key="fake-api-key",
        messages=messages,
        n=5,
        temperature=0.2,
        top_p=0.95,
        stop=["a"],
        max_completion_tokens=4096,
        frequency_penalty=0.1,
        seed=3,
        repetition_penalty=1.05,
    )
    # No max_tokens: the default is the context's end.
    one = litellm.completion(
        model="hosted_vllm/tiny", api_base=f"{url}/v1", api_key="fake-api-key", messages=messages, temperature=0.0
    )
    chain = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="EMPTY", temperature=0.0)
    said = {
        "many": [choice.message.content for choice in many.choices],
        "one": one.choices[0].message.content,
        "finish": one.choices[0].finish_reason,
        "chain": chain.invoke(question).content,
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
