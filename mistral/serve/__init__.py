"""A local server that speaks OpenAI's protocol, and a page to chat with. Sits on the loader and chat."""
