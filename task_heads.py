"""Three task heads, each one linear layer on the backbone of either family.

    B  batch · T  tokens · C  width · N  labels (config.num_labels)

    ForSequenceClassification   the last token's hidden state -> N logits: one label for a text
    ForTokenClassification      every hidden state -> N logits: a label for each token
    ForQuestionAnswering        every hidden state -> 2 logits: the answer starts here, ends here

neo.py and neox.py give each of them a config and a backbone.  The first head uses the last token,
since in a causal model only the last token has read the whole text.  With naive attention, logits
and losses are equal to transformers' to the bit (modeling_gpt_neo.py, modeling_gpt_neox.py,
loss_utils.py, v5.23.0).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import is_traced
from base import PreTrainedModel, as_usual, check_tensor


class Head(PreTrainedModel):
    """A backbone with a linear layer on top.  `head` is its name, as in transformers' files."""

    backbone_class = None                                  # set in neo.py and neox.py
    bias = True

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.transformer = self.backbone_class(config, attn_implementation)
        layer = nn.Linear(config.hidden_size, self.outputs(config), bias=self.bias)
        self.add_module(self.head, layer)
        self.init_weights(layer)

    @staticmethod
    def outputs(config):
        """Number of logits."""
        return config.num_labels

    def hidden_states(self, input_ids, attention_mask, position_ids, **how):
        """The backbone's ModelOutput, and its last hidden states (B, T, C) taken out of it."""
        out = self.transformer(input_ids, attention_mask, position_ids, **how)
        x, out.last_hidden_state = out.last_hidden_state, None
        return out, x


class ForSequenceClassification(Head):
    """One label for a whole text."""

    head, bias = "score", False

    @as_usual
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None,
                output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with logits (B, N), and loss if labels are given.

        labels: what they are depends on config.problem_type.
            single_label_classification   (B,) class ids
            multi_label_classification    (B, N) of 0.0 and 1.0
            regression                    (B,) or (B, N) numbers
            None                          regression if N = 1, otherwise a single label if they
                                          are integers and several labels if not
        Raises ValueError for labels of another shape, and for more than one row if the config has
        no pad_token_id, since then the ends of the rows are not known.
        """
        out, x = self.hidden_states(input_ids, attention_mask, position_ids,
                                    output_hidden_states=output_hidden_states,
                                    output_attentions=output_attentions,
                                    inputs_embeds=inputs_embeds)
        logits = self.score(x)              # (B, T, N): all tokens, as transformers does; same bits
        out.logits = logits[torch.arange(len(x), device=x.device), self.last_token(input_ids, x)]
        if labels is not None:
            check_tensor("labels", labels)
            out.loss = sequence_loss(out.logits, labels.to(x.device), self.config)
        return out

    def last_token(self, input_ids, x=None):
        """Index (B,) of the rightmost token of each row that is not padding.

        The padding may be on either side.  It is recognized by its id and not by the mask, so if
        pad and eos are one token, an eos at the end of the text counts as padding too (transformers
        since 4.49, pull request 35911).  Where inputs_embeds were given there are no ids: then it
        is the last token of each row, as in transformers, and x (B, T, C) gives the shape.
        """
        pad = self.config.pad_token_id
        shaped = x if input_ids is None else input_ids
        B, T = shaped.shape[:2]
        if pad is None and B > 1:
            raise ValueError(f"{B} texts at once need to know which token is padding: load the "
                             "model with from_pretrained(..., pad_token_id=...)")
        if pad is None or input_ids is None:
            return torch.full((B,), T - 1, device=shaped.device)
        places = torch.arange(T, device=input_ids.device)
        return (places * (input_ids != pad)).argmax(-1)    # 0 in a row of padding only


class ForTokenClassification(Head):
    """A label for every token."""

    head = "classifier"
    upcast_loss = True

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.dropout = nn.Dropout(config.classifier_dropout)

    @as_usual
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None,
                output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with logits (B, T, N), and loss if given labels.

        labels (B, T): the class id of each token, without a shift; -100 leaves a token out of the
        loss.  Raises ValueError for labels of another shape and for ids that are not a class.
        """
        out, x = self.hidden_states(input_ids, attention_mask, position_ids,
                                    output_hidden_states=output_hidden_states,
                                    output_attentions=output_attentions,
                                    inputs_embeds=inputs_embeds)
        out.logits = self.classifier(self.dropout(x))
        if labels is not None:
            check_tensor("labels", labels)
            logits = out.logits.float() if self.upcast_loss else out.logits
            out.loss = class_loss(logits, labels.to(x.device), "(batch, tokens)")
        return out


class ForQuestionAnswering(Head):
    """The first and the last token of an answer in the text."""

    head = "qa_outputs"

    @staticmethod
    def outputs(config):
        return 2                                           # start and end, whatever num_labels says

    @as_usual
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, start_positions=None,
                end_positions=None, output_hidden_states=False, output_attentions=False,
                inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with start_logits and end_logits, each (B, T).

        start_positions, end_positions (B,) or (B, 1): indices of tokens.  If both are given, loss
        is the mean of their cross entropies.  An index beyond the text (>= T, for example where the
        text was truncated) is left out of the loss, a negative one counts as 0.
        Raises ValueError if there is not one index for each row.
        """
        out, x = self.hidden_states(input_ids, attention_mask, position_ids,
                                    output_hidden_states=output_hidden_states,
                                    output_attentions=output_attentions,
                                    inputs_embeds=inputs_embeds)
        logits = self.qa_outputs(x)                        # (B, T, 2)
        out.start_logits, out.end_logits = (part.contiguous() for part in logits.unbind(-1))
        if start_positions is not None and end_positions is not None:
            out.loss = (position_loss(out.start_logits, start_positions, "start_positions")
                        + position_loss(out.end_logits, end_positions, "end_positions")) / 2
        return out


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------

def sequence_loss(logits, labels, config):
    """The loss () for logits (B, N); labels as in ForSequenceClassification.forward."""
    kind = config.problem_type
    if kind is None:
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
        kind = ("regression" if config.num_labels == 1 else
                "single_label_classification" if whole else "multi_label_classification")
    if kind == "single_label_classification":
        return class_loss(logits, labels, "(batch,)")
    if labels.numel() != logits.numel():
        raise ValueError(f"labels for {kind} must have the shape {tuple(logits.shape)} of the "
                         f"logits, got {tuple(labels.shape)}")
    if kind == "multi_label_classification":
        if not labels.is_floating_point():
            raise ValueError(f"labels for {kind} must be 0.0 and 1.0 (.float() makes them so), got "
                             f"{labels.dtype}")
        return F.binary_cross_entropy_with_logits(logits, labels)
    if config.num_labels == 1:
        return F.mse_loss(logits.squeeze(), labels.squeeze())
    return F.mse_loss(logits, labels)


def class_loss(logits, labels, shape):
    """Mean cross entropy () of class ids: logits (..., N), labels (...), -100 is left out."""
    N = logits.size(-1)
    if labels.numel() * N != logits.numel():
        raise ValueError("labels must be one class id each of "
                         f"{shape} = {tuple(logits.shape[:-1])}, got shape {tuple(labels.shape)}")
    if not is_traced():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= N))]
        if len(wrong):
            raise ValueError(f"labels must be 0 to {N - 1}, or -100 to leave a token out; got "
                             f"{wrong[0].item()} (the config's num_labels is {N})")
    return F.cross_entropy(logits.reshape(-1, N), labels.reshape(-1).long())


def position_loss(logits, positions, name):
    """Mean cross entropy () of token indices: logits (B, T), positions (B,) or (B, 1)."""
    B, T = logits.shape
    check_tensor(name, positions)
    if positions.numel() != B:
        raise ValueError(f"{name} must be one index for each of {B} rows, got shape "
                         f"{tuple(positions.shape)}")
    positions = positions.to(logits.device).reshape(B).clamp(0, T).long()
    return F.cross_entropy(logits, positions, ignore_index=T)
