"""Three task heads, each one linear layer on the backbone of either family.

    B  batch · T  tokens · C  width · N  labels (config.num_labels)

    ForSequenceClassification   the last real token's hidden state -> N logits: one label for a text
    ForTokenClassification      every hidden state -> N logits: a label for each token
    ForQuestionAnswering        every hidden state -> 2 logits: does the answer start here, end here?

neo.py and neox.py give each its config and its backbone.  A causal model has read a whole text only at its
last token, which is why the first head looks there.  Logits and losses are transformers' own
(modeling_gpt_neo.py, modeling_gpt_neox.py, loss_utils.py, v5.23.0), to the bit with naive attention.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from base import PreTrainedModel


class Head(PreTrainedModel):
    """A backbone and a linear layer over it, whose name transformers' files use."""

    backbone_class = None                                  # set in neo.py and neox.py
    bias = True

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.transformer = self.backbone_class(config, attn_implementation)
        self.add_module(self.head, nn.Linear(config.hidden_size, self.outputs(config), bias=self.bias))
        self.init_weights(getattr(self, self.head))

    @staticmethod
    def outputs(config):
        return config.num_labels

    def hidden_states(self, input_ids, attention_mask, position_ids, **how):
        """The backbone's output, and the hidden states (B, T, C) taken out of it."""
        out = self.transformer(input_ids, attention_mask, position_ids, **how)
        x, out.last_hidden_state = out.last_hidden_state, None
        return out, x


class ForSequenceClassification(Head):
    head, bias = "score", False

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None,
                output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with logits (B, N), and loss if labels are given.

        labels by config.problem_type: (B,) class ids for single_label_classification, (B, N) of 0.0 and
        1.0 for multi_label_classification, (B,) or (B, N) numbers for regression.  Without one, N = 1
        means regression, integer labels a single class, others several.
        Raises ValueError for more than one row without config.pad_token_id, which tells where rows end.
        """
        out, x = self.hidden_states(input_ids, attention_mask, position_ids,
                                    output_hidden_states=output_hidden_states,
                                    output_attentions=output_attentions, inputs_embeds=inputs_embeds)
        logits = self.score(x)                             # (B, T, N), as the reference: all, then one
        out.logits = logits[torch.arange(len(x), device=x.device), self.last_token(input_ids, x)]
        if labels is not None:
            out.loss = sequence_loss(out.logits, labels.to(x.device), self.config)
        return out

    def last_token(self, input_ids, x=None):
        """Index of each row's rightmost token that is not padding, on whichever side that is.  -> (B,)

        x (B, T, C) tells the shape where there are no ids, because inputs_embeds were given: then it is each
        row's last token, as in the reference.
        Padding is known by its id, not by the mask: where pad and eos are one token, an eos at the end of
        the text counts as padding too (transformers since 4.49, pull request 35911).
        """
        pad = self.config.pad_token_id
        shaped = x if input_ids is None else input_ids
        B, T = shaped.shape[:2]
        if pad is None and B > 1:
            raise ValueError(f"{B} texts at once need to know which token is padding: load the model with "
                             "from_pretrained(..., pad_token_id=...)")
        if pad is None or input_ids is None:
            return torch.full((B,), T - 1, device=shaped.device)
        places = torch.arange(T, device=input_ids.device)
        return (places * (input_ids != pad)).argmax(-1)    # nothing but padding: 0


class ForTokenClassification(Head):
    head = "classifier"
    upcast_loss = True

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None,
                output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with logits (B, T, N), and loss if labels are given.

        labels (B, T): class ids of these very tokens (nothing is shifted), -100 where not to be scored.
        """
        out, x = self.hidden_states(input_ids, attention_mask, position_ids,
                                    output_hidden_states=output_hidden_states,
                                    output_attentions=output_attentions, inputs_embeds=inputs_embeds)
        out.logits = self.classifier(self.dropout(x))
        if labels is not None:
            logits = out.logits.float() if self.upcast_loss else out.logits
            out.loss = class_loss(logits, labels.to(x.device), "(batch, tokens)")
        return out


class ForQuestionAnswering(Head):
    head = "qa_outputs"

    @staticmethod
    def outputs(config):
        return 2                                           # start and end, whatever num_labels says

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, start_positions=None,
                end_positions=None, output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with start_logits and end_logits, each (B, T).

        start_positions, end_positions (B,) or (B, 1): indices of tokens; with both given, loss is the mean
        of the two cross entropies.  One beyond the text (>= T, as when the text was cut) is left out of it,
        a negative one counts as 0.
        """
        out, x = self.hidden_states(input_ids, attention_mask, position_ids,
                                    output_hidden_states=output_hidden_states,
                                    output_attentions=output_attentions, inputs_embeds=inputs_embeds)
        out.start_logits, out.end_logits = (part.contiguous() for part in self.qa_outputs(x).unbind(-1))
        if start_positions is not None and end_positions is not None:
            out.loss = (position_loss(out.start_logits, start_positions, "start_positions")
                        + position_loss(out.end_logits, end_positions, "end_positions")) / 2
        return out


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------

def sequence_loss(logits, labels, config):
    """logits (B, N); labels by the problem's type.  -> ()"""
    kind = config.problem_type
    if kind is None:
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
        kind = ("regression" if config.num_labels == 1 else
                "single_label_classification" if whole else "multi_label_classification")
    if kind == "single_label_classification":
        return class_loss(logits, labels, "(batch,)")
    if labels.numel() != logits.numel():
        raise ValueError(f"labels for {kind} must have the shape {tuple(logits.shape)} of the logits, got "
                         f"{tuple(labels.shape)}")
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    if config.num_labels == 1:
        return F.mse_loss(logits.squeeze(), labels.squeeze())
    return F.mse_loss(logits, labels)


def class_loss(logits, labels, shape):
    """Mean cross entropy of class ids, -100 left out; logits (..., N), labels (...)."""
    N = logits.size(-1)
    if labels.numel() * N != logits.numel():
        raise ValueError(f"labels must be one class id each of {shape} = {tuple(logits.shape[:-1])}, got "
                         f"shape {tuple(labels.shape)}")
    if not torch.compiler.is_compiling():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= N))]
        if len(wrong):
            raise ValueError(f"labels must be 0 to {N - 1}, or -100 for not to be scored; got "
                             f"{wrong[0].item()} "
                             "(num_labels says how many there are)")
    return F.cross_entropy(logits.reshape(-1, N), labels.reshape(-1).long())


def position_loss(logits, positions, name):
    """Mean cross entropy of token indices: logits (B, T), positions (B,) or (B, 1)."""
    B, T = logits.shape
    if positions.numel() != B:
        raise ValueError(f"{name} must be one index for each of {B} rows, got shape {tuple(positions.shape)}")
    positions = positions.to(logits.device).reshape(B).clamp(0, T).long()
    return F.cross_entropy(logits, positions, ignore_index=T)
