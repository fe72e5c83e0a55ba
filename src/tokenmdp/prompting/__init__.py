"""Prompt-OIRL: a prompt is the one action of a one-step MDP, logged trials are demonstrations, Υ(query, prompt) the reward.

    log.py       trials: which prompt was tried on which query, and what came of it
    champ.py     CHAMP's conversations as trials
    leaks.py     whether queries that were held out repeat queries that were learned from
    features.py  queries and prompts as numbers, embedded once each
    proxy.py     Υ, the learned reward of a query and a prompt
    stacked.py   several of them weighed by what they said of unseen questions, or one put right
    estimate.py  what a prompt policy is worth, from a log of another's choices
    choose.py    which prompt to use for a query, or several, or the best constant after all

Fitting, estimating and choosing make no call to a language model. Source: Sun, Hüyük & van der Schaar 2023 (Prompt-OIRL).
"""
