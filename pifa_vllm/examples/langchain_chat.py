"""LangChain against a running server: `pifa-vllm serve CHECKPOINT`, then `python langchain_chat.py [URL]`."""

import os
import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"

# Both clients read the server's key there, and want one even if the server does not.
os.environ.setdefault("OPENAI_API_KEY", "none")
# It serves one model, under a name of its own.
name = OpenAI(base_url=url).models.list().data[0].id

prompt = ChatPromptTemplate.from_messages(
    [("system", "You answer in one sentence."), ("user", "What is {subject}?")]
)
chain = prompt | ChatOpenAI(base_url=url, model=name, max_completion_tokens=48, temperature=0.0)
for part in chain.stream({"subject": "a matrix of low rank"}):
    print(part.content, end="", flush=True)
print()
