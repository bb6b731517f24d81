"""Chat templates shaped like published ones, with what makes each of them hard."""

# The last user message decides which thoughts are shown; tool results become part of a user turn; tools join the
# system message; an answer at the end gets an empty block of thoughts where it has none.
_QWEN3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
{{- '# Tools\\n<tools>' -}}{%- for t in tools -%}{{- '\\n' + (t | tojson) -}}{%- endfor -%}
{{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}OPEN
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content.lstrip('\\n') -}}
{%- for call in m.tool_calls or [] -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson -}}{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}CLOSE{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
# Tools in the first user message, calls as bare JSON with `parameters`, results as JSON under another role's name;
# the text beside a call is not written.
_LLAMA3_TOOLS = """\
{{- bos_token -}}
{%- set ns = namespace(told=false) -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' -}}
{%- elif m.role == 'user' -%}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
{%- if tools and not ns.told -%}{%- set ns.told = true -%}
{{- 'Call a function with JSON.' -}}{%- for t in tools -%}{{- '\\n' + (t | tojson(indent=4)) -}}{%- endfor -%}
{{- '\\n\\n' -}}{%- endif -%}
{{- (m.content | trim) + '<|eot_id|>' -}}
{%- elif m.role in ('tool', 'ipython') -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}OPEN
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
{%- set f = m.tool_calls[0].function -%}
{{- '{"name": "' + f.name + '", "parameters": ' -}}{{- f.arguments | tojson -}}{{- '}' -}}
{%- else -%}{{- m.content | trim -}}{%- endif -%}
{{- '<|eot_id|>' -}}CLOSE
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


def _form(text: str, tagged: bool) -> str:
    marks = ("{%- generation -%}", "{%- endgeneration -%}") if tagged else ("", "")
    return text.replace("OPEN", marks[0]).replace("CLOSE", marks[1])


QWEN3, QWEN3_TAGGED = _form(_QWEN3, False), _form(_QWEN3, True)
LLAMA3_TOOLS, LLAMA3_TOOLS_TAGGED = _form(_LLAMA3_TOOLS, False), _form(_LLAMA3_TOOLS, True)
# Puts strings together, so arguments must be text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + '```json\n' + c.function.arguments + '\n```' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same without the string arithmetic: an object would be printed as Python prints it.
PRINTED_ARGUMENTS = TEXT_ARGUMENTS.replace(" + c.function.arguments + ", " ~ c.function.arguments ~ ")
# Shows the tools before the last question only.
MOVING_TOOLS = (
    "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]{{ m.content }}"
    "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Its prompt opens the thoughts, and a finished answer never shows them.
THOUGHTS_NEVER_SHOWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nPROMPT{% endif %}"
)
# Ends calls with a token of their own, and thinks in a channel.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}<|start|>assistant<|channel|>analysis"
    "<|message|>{{ m.thinking }}<|end|>{% endif %}{% if m.tool_calls %}<|start|>assistant to="
    "{{ m.tool_calls[0].function.name }}<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
