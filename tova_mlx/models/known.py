"""Model files of mlx-lm that are known to be refused, and why."""

# Model files that no bounded cache can be right with, and why.
REFUSED = {
    "afm7": "places the queries of shared layers by the number of tokens held, which "
    "is not the number seen",
    "deepseek_v32": "chooses by slot what to attend to in two caches at once",
    "glm_moe_dsa": "chooses by slot what to attend to in two caches at once",
    "minimax_m3_vl": "chooses blocks of slots to attend to, by their number",
    "phi3small": "places blocks of slots by their number",
    "iquestloopcoder": "attends to a cache of the loop before, with that of another",
    "muse_spark": "runs on Metal only, so bounded caches were never tried with it",
}
