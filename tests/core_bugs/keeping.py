"""Mistakes in what is stored, saved and made, and in what is put into mlx-lm."""

from .mutant import Mutant

_STORAGE = [
    (
        "a tile of values has the weights of the first",
        "parts.append(left[..., start:stop] @ some)",
        "parts.append(left[..., : stop - start] @ some)",
    ),
    (
        "scales are those of the model's type",
        "entries.astype(_SCALES), group_size=self.group_size, bits=self.bits",
        "entries, group_size=self.group_size, bits=self.bits",
    ),
    (
        "the width of quantised rows is that of their words",
        "return (*self.data.shape[:3], self.data.shape[3] * 32 // self.bits)",
        "return (*self.data.shape[:3], self.data.shape[3] * 8)",
    ),
    (
        "a product leaves the centre out",
        "result = result + left @ self.center.array.swapaxes(2, 3)",
        "result = result + 0.0",
    ),
    (
        "keys come back without their centre",
        "return entries if self.center is None else entries + self.center.array",
        "return entries",
    ),
    (
        "the centre is added before keys are stored",
        "entries = entries - self.center.array",
        "entries = entries + self.center.array",
    ),
    (
        "the first key counts in the centre",
        "mean = entries[0, :, _SINKS:].astype(mx.float32).mean(axis=1)",
        "mean = entries[0].astype(mx.float32).mean(axis=1)",
    ),
    (
        "weights are not summed for the centre",
        "result = result + left.sum(axis=3, keepdims=True) * self.center.array",
        "result = result + self.center.array",
    ),
    (
        "a transform that is not symmetric is its own inverse",
        "return entries @ turn(mx.eye(width)).T",
        "return entries @ turn(mx.eye(width))",
    ),
    (
        "products do not turn the queries",
        "result = self.turned.product(turn(left), True)",
        "result = self.turned.product(left, True)",
    ),
    (
        "a wider layer loses its centre",
        "return replace(self, affine=replace(self.affine, bits=_WIDE))",
        "return replace(self, affine=replace(self.affine, bits=_WIDE), center=None)",
    ),
    (
        "values get the bits that keys need",
        "return self._replace(keys=self.keys and self.keys.widened())",
        "return self._replace(values=self.values and self.values.widened())",
    ),
    (
        "formats of keys and values are swapped",
        "return _stored(self.keys, keys), _stored(self.values, values)",
        "return _stored(self.values, keys), _stored(self.keys, values)",
    ),
    (
        "formats are fitted to values for keys",
        "found[i] = storage.fitted(keys, values)",
        "found[i] = storage.fitted(values, keys)",
    ),
    (
        "every layer is widened",
        "return [i for i in loud if noises[i] > _LOUD * usual]",
        "return loud",
    ),
    (
        "the quietest layers are widened",
        "loud = sorted(noises, key=lambda i: -noises[i])",
        "loud = sorted(noises, key=lambda i: noises[i])",
    ),
    (
        "constants are not in the file",
        "(constants if any(constants) else ())",
        "()",
    ),
    (
        "a cache quantised on the way is centred on nothing",
        "storage = storage.fitted(*map(dequantized, self.held_entries()))",
        "storage = storage.widened()",
    ),
    (
        "a cache quantised on the way keeps its options",
        "return self.of(options, stored, self.shares)",
        "return self.of(self.options, stored, self.shares)",
    ),
]

_WATCH = (
    "test_interrupted.py::test_layers_watch_each_other_however_their_caches_came",
)
_BACK = ("test_recall.py::test_taking_tokens_back_takes_back_what_was_recalled",)
_TWICE = ("test_recall.py::test_tokens_are_taken_back_over_several_flushes",)
_TILES = ("test_recall.py::test_an_archive_is_read_in_tiles_as_in_one",)
_READ = (
    *_TILES,
    "test_recall.py::test_it_is_token_by_token_whatever_the_chunks",
)

_ARCHIVE = [
    (
        "a block that is torn is read",
        "or crc != self._crc(rows, block):",
        "or not crc:",
    ),
    (
        "a block in the place of another is read",
        'number = (self.salt ^ block).to_bytes(8, "little")',
        'number = self.salt.to_bytes(8, "little")',
    ),
    (
        "a block that is written again is not checked",
        "        self._checked[place] = False\n",
        "",
    ),
    (
        "rows that are being overwritten are held",
        "(self._blocks + 1 - self._places) * BLOCK)",
        "(self._blocks - self._places) * BLOCK)",
    ),
    (
        "a cut within a block forgets its rows",
        "if rest and blocks < self._blocks and count > self.first:",
        "if rest and blocks > self._blocks and count > self.first:",
    ),
    (
        "a cut below the first row leaves it",
        "self._buffered = min(self.first, count), blocks, rest",
        "self._buffered = self.first, blocks, rest",
    ),
    (
        "rows that are appended over a block's end go lost",
        "part.buffer[self._buffered : end] = rows[name][done:stop]",
        "part.buffer[self._buffered : end] = rows[name][: stop - done]",
    ),
    (
        "rows at hand are mixed up with those on disk",
        "                found[on_disk] = stored\n",
        "",
    ),
    (
        "files of others are swept away",
        "if head != MAGIC and not early:",
        "if head != MAGIC and found_lock is None:",
    ),
    (
        "archived rows that were taken back stay",
        "return replace(self, count=count, lost=min(self.lost, count))",
        "return replace(self, count=count + n, lost=self.lost)",
        _BACK,
    ),
    (
        "a row in its slot is archived too",
        "n = offset - 1 - self.first - self.archive.count",
        "n = offset - self.first - self.archive.count",
        _BACK,
    ),
    (
        "what went to the archive last is not taken back",
        "undone = [f for f in self.flushes if f.offset > to]",
        "undone = [f for f in self.flushes if f.offset > to + 1]",
        _BACK,
    ),
    (
        "rows come back from the archive in the wrong order",
        "for flush in reversed(undone):",
        "for flush in undone:",
        _TWICE,
    ),
    (
        "flushes that somebody can go back to are dropped",
        "flushes = tuple(f for f in self.flushes if f.offset > offset - self.journal)",
        "flushes = ()",
        _TWICE,
    ),
    (
        "the slots keep their whole weight",
        "return (output * (1 - share) + self.output * share).astype(output.dtype)",
        "return (output + self.output * share).astype(output.dtype)",
        _READ,
    ),
    (
        "the blocks that are least attended to come back",
        "blocks = np.sort(np.argpartition(-best, n - 1, axis=1)[:, :n], axis=1)",
        "blocks = np.sort(np.argpartition(best, n - 1, axis=1)[:, :n], axis=1)",
        _READ,
    ),
    (
        "rows that wait for the archive are out of sight",
        "return n, self.waiting.cut(0, waiting)",
        "return n, None",
        _READ,
    ),
    (
        "a token attends twice to what its chunk evicts",
        "return n, self.waiting.cut(0, waiting)",
        "return n, self.waiting",
        _READ,
    ),
    (
        "what a chunk evicts is out of its sight",
        "outputs.append(_attend_to_all(queries, keys, values, args))",
        "outputs += [attend_again(blocks, queries, keys, values, args)]",
        _READ,
    ),
    (
        "what a part evicts by age is out of its sight",
        "hides = rule.by_age and slots.recall is None",
        "hides = rule.by_age",
        _READ,
    ),
    (
        "what a short chunk evicts by age is out of its sight",
        "whole = self.options.recall or is_cut(self._slots, N)",
        "whole = is_cut(self._slots, N)",
        _READ,
    ),
    (
        "tokens after a chunk's are in its sight",
        "visible = mx.arange(n) <= mx.arange(n - length, n)[:, None]",
        "visible = mx.arange(n) <= mx.arange(n - length, n)[-1:, None]",
        _READ,
    ),
    (
        "fewer wait for the archive than there are slots for",
        "return Recall(slots, first, archive, options.journal, period=slots)",
        "return Recall(slots, first, archive, options.journal, period=16)",
        (
            "test_recall.py::test_bytes_stay_below_what_is_said_and_the_archive_is_counted_apart",
        ),
    ),
    (
        "a head of a group chooses for all",
        "logits.append(np.array(_logits(asked, tile).max(axis=2)))",
        "logits.append(np.array(_logits(asked, tile)[:, :, 0]))",
        _READ,
    ),
    (
        "what the first of a chunk attended to most counts as the newest's",
        "newest = Asked(queries[:, :, -1:] * args.scale, archive.count)",
        "newest = Asked(queries[:, :, :1] * args.scale, archive.count)",
        _READ,
    ),
    (
        "tiles' values are added up as if all had one maximum",
        "_Sums(self.output * before + output,",
        "_Sums(self.output + output,",
        _TILES,
    ),
    (
        "tiles' weights are added up as if all had one maximum",
        "self.total * before + total, top)",
        "self.total + total, top)",
        _TILES,
    ),
    (
        "only the last tile is read",
        "_Sums(self.output * before + output,",
        "_Sums(output,",
        _TILES,
    ),
    (
        "exponentials are of logits less no lower number than 0",
        "_NOTHING = _Sums(mx.array(0.0), mx.array(0.0), mx.array(_LOWEST))",
        "_NOTHING = _Sums(mx.array(0.0), mx.array(0.0), mx.array(0.0))",
        ("test_recall.py::test_logits_far_below_zero_count",),
    ),
    (
        "queries of a chunk read what the first ones do",
        "return Recalled(*(a[:, :, start:stop] for a in self))",
        "return Recalled(*(a[:, :, : stop - start] for a in self))",
        ("test_recall.py::test_more_tokens_than_are_attended_with_at_once_recall",),
    ),
    (
        "blocks are told that were archived since",
        "count -= archive.lost",
        "count = archive.held",
        _TILES,
    ),
    (
        "rows are archived over those before",
        "write(pad(part, 0, more), new, self.held)",
        "write(pad(part, 0, more), new, 0)",
        _READ,
    ),
    (
        "a limit is what a log has at least",
        "max(2, limit_rows // BLOCK) if limit_rows",
        "max(2, -(-limit_rows // BLOCK)) if limit_rows",
        ("test_recall.py::test_a_limit_on_disk_is_kept_and_the_oldest_go",),
    ),
    (
        "tokens can be taken back where some are lost",
        "flushes = () if archive.lost else recall.flushes",
        "flushes = recall.flushes",
        ("test_recall.py::test_what_is_lost_is_not_taken_back",),
    ),
    (
        "queries are compared with the archive unscaled",
        "n, asked = queries.shape[2], queries * args.scale",
        "n, asked = queries.shape[2], queries",
        _READ,
    ),
    (
        "queries of parts are compared with the archive unscaled",
        "ahead = Ahead(queries * args.scale, chunk.keys.shape[1], archive)",
        "ahead = Ahead(queries, chunk.keys.shape[1], archive)",
        _READ,
    ),
    (
        "what goes to the archive within a chunk is out of its sight",
        "        ahead.read(slots.recall.archive)\n",
        "        pass\n",
        _READ,
    ),
    (
        "what was archived before a chunk is read again with each of its parts",
        "archive.tiles(_rows_at_once(self._asked), self._read)",
        "archive.tiles(_rows_at_once(self._asked), 0)",
        _READ,
    ),
    (
        "each part of a chunk reads what the first does",
        "self._asked[..., n:, :], self._sums.cut(n, None)",
        "self._asked[..., n:, :], self._sums.cut(0, self.left - n)",
        _READ,
    ),
    (
        "what a limit has let go of is read to the end of a chunk",
        "if archive.lost != self._lost:",
        "if archive.lost < self._lost:",
        ("test_recall.py::test_a_limit_on_disk_is_kept_and_the_oldest_go",),
    ),
    (
        "the row that was archived last is in no tile",
        "for start, stop in tiles(first, self.held, most):",
        "for start, stop in tiles(first, self.held - 1, most):",
        _READ,
    ),
    (
        "the row that was archived last is in no tile of a disk",
        "tiles(self._log.first + first, self._log.count, most):",
        "tiles(self._log.first + first, self._log.count - 1, most):",
        ("test_recall.py::test_an_archive_on_disk_gives_what_one_in_memory_gives",),
    ),
    (
        "a copy goes on with what another one archived",
        "if any(cut < written for cut in disk.cuts[self.cuts :]):",
        "if any(cut < 0 for cut in disk.cuts[self.cuts :]):",
    ),
    (
        "rows that wait for a disk are not taken back",
        "return replace(self, count=self.count - n, given=self.given[:-1])",
        "return replace(self, count=self.count - n)",
        _BACK,
    ),
    (
        "the archive is not told apart from the slots in bytes",
        "archived = 0 if self.archives_on_disk else self.archive_nbytes",
        "archived = 0",
    ),
]

_SAVED = [
    (
        "rotary positions are saved as if nothing was renumbered",
        'config["shift"] = slots.shift',
        'config["shift"] = 0',
    ),
    (
        "what is stored for is saved for what is wanted",
        "others += [rotary, stored]",
        "others += [rotary, rotary]",
    ),
    (
        "the victim is not saved",
        "return (*entries, *others, victim, slots.offset, json.dumps(config))",
        "return (*entries, *others, None, slots.offset, json.dumps(config))",
    ),
    (
        "the length of the journal is not saved",
        '"journal": slots.journal.length,',
        '"journal": 16,',
    ),
    (
        "pins are not saved",
        'config["pinned"] = slots.rule.pinned',
        'config["pinned"] = 0',
    ),
    (
        "keys of an archive are saved for its values",
        "rows = tuple(map(to_arrays, archive.rows()))",
        "rows = tuple(map(to_arrays, (archive.rows()[i] for i in (0, 0, 2))))",
    ),
    (
        "rows that wait for the archive are not loaded",
        "        waiting=rows,\n",
        "        waiting=None,\n",
    ),
    (
        "rows that were lost are not saved",
        '"lost": archive.lost if isinstance(archive, Archive) else None,',
        '"lost": 0 if isinstance(archive, Archive) else None,',
        ("test_recall.py::test_a_limit_on_disk_is_kept_and_the_oldest_go",),
    ),
    (
        "where the newest token lies is not loaded",
        "slots.written = _written_last(slots)",
        "_written_last(slots)",
    ),
    (
        "whether others share keys is not loaded",
        'self._configure(made, slots, how["shares"])',
        "self._configure(made, slots)",
    ),
    (
        "a victim past the slots is loaded",
        "if slots.victim is not None and mx.any(slots.victim >= n).item():",
        "if slots.victim is not None and mx.any(slots.victim > n).item():",
    ),
    (
        "a token that is held twice is loaded",
        "(np.diff(held) > 0).all()\n        and (np.diff(there) > 0).all()",
        "(np.diff(held) >= 0).all()\n        and (np.diff(there) >= 0).all()",
    ),
    (
        "tokens that are still to come are loaded",
        "and (there < offset).all()",
        "and (there <= offset).all()",
    ),
    (
        "a protected token that is not held is loaded",
        "and _begin(held, rule.n_sinks)",
        "and _begin(held, 0)",
    ),
    (
        "values that are not numbers are loaded",
        "    check_finite(slots.values, slots.taken)\n",
        "",
    ),
    (
        "infinite scores are loaded",
        "if not ((slot == victim) | np.isfinite(scores)).all():",
        "if not ((slot == victim) | ~np.isnan(scores)).all():",
    ),
    (
        "slots that are not enough are loaded",
        "if n < slots.taken or (limit is not None and n > limit + 1):",
        "if limit is not None and n > limit + 1:",
    ),
    (
        "another model's prompt is loaded",
        "if metadata.get(_FINGERPRINT) not in (None, fingerprint(model)):",
        "if metadata.get(_FINGERPRINT) == fingerprint(model)[::-1]:",
    ),
    (
        "a fingerprint does not see the order of numbers",
        "        np.add(twice, once, out=twice)\n",
        "        np.add(twice, row, out=twice)\n",
    ),
    (
        "a fingerprint leaves the last numbers out",
        "        digest.update(numbers[whole:].data)\n",
        "",
    ),
    (
        "layers that were interrupted are loaded",
        "if len(seen := {c.seen for c in used}) > 1:",
        "if len(seen := {c.seen for c in used}) > 99:",
    ),
    (
        "loaded caches do not watch each other",
        "    keep_together(caches)\n    return caches, metadata\n",
        "    return caches, metadata\n",
        _WATCH,
    ),
    (
        "an archive on disk is not saved",
        "here = [_in_memory(c) for c in cache]",
        "here = list(cache)",
        (
            "test_recall.py::test_what_is_on_disk_is_saved_and_goes_on_where_it_is_loaded",
        ),
    ),
    (
        "a save that fails leaves half a file",
        "mlx_lm_cache.save_prompt_cache(str(written), here, metadata)",
        "mlx_lm_cache.save_prompt_cache(str(path), here, metadata)\n"
        "            mlx_lm_cache.save_prompt_cache(str(written), here, metadata)",
    ),
]

_CONVERSION = [
    (
        "a second conversion shadows the first",
        "self.shadowed = before.shadowed if isinstance(before, _Maker) else before",
        "self.shadowed = before",
    ),
    (
        "what the model itself had is not put back",
        "            model.make_cache = maker.shadowed\n",
        "            pass\n",
    ),
    (
        "a copy of a model makes caches for the original",
        "twin._model = ref(memo.get(id(model), model))",
        "twin._model = ref(model)",
    ),
    (
        "a copy of a model forgets its pins",
        "        twin.pinned = self.pinned\n",
        "        twin.pinned = 0\n",
    ),
    (
        "new caches do not pin",
        "        pin_tokens(caches, self.pinned)\n",
        "",
        ("test_serving.py",),
    ),
    (
        "new caches do not watch each other",
        "            if isinstance(cache, PolicyKVCache):\n"
        "                cache.share()\n"
        "    keep_together(caches)\n",
        "            if isinstance(cache, PolicyKVCache):\n"
        "                cache.share()\n",
        _WATCH,
    ),
    (
        "layers that share keys are not told",
        "                cache.share()\n    keep_together(caches)\n",
        "                pass\n    keep_together(caches)\n",
        ("test_batch.py::test_rows_of_a_model_that_shares_keys",),
    ),
    (
        "what a model bounds itself is bounded too",
        "if type(cache) is not mlx_lm_cache.KVCache:\n            return cache",
        "pass",
        ("test_batch.py::test_models_of_all_kinds_batch",),
    ),
    (
        "caches in a list are not bounded",
        "return mlx_lm_cache.CacheList(*map(bounded, cache.caches))",
        "return cache",
        (
            "test_journal.py::"
            "test_caches_in_a_list_are_taken_back_together_or_not_at_all",
        ),
    ),
    (
        "formats that were fitted are not used",
        "own = replace(made, storage=storage, archived=kept_as)",
        "own = made",
        ("test_hadamard.py",),
    ),
    (
        "a model is converted unchecked",
        "    _checked(model, made)\n    model.make_cache",
        "    model.make_cache",
    ),
    (
        "rows do not share a budget",
        "size = tokens_within(model, size, parts=rows, **options).tokens",
        "size = tokens_within(model, size, parts=1, **options).tokens",
    ),
    (
        "what does not grow is not in a budget",
        "(nbytes // parts - fixed) // per_token",
        "nbytes // parts // per_token",
    ),
    (
        "a megabyte is a mebibyte",
        "(1024 if i else 1000) ** power",
        "1024**power",
    ),
    (
        "the least is one too little",
        "        if _takes(made_for, middle):\n            high = middle",
        "        if not _takes(made_for, middle):\n            high = middle",
    ),
    (
        "TOVA is not a TOVACache",
        'kind = TOVACache if options.rule.policy == "tova" else PolicyKVCache',
        "kind = PolicyKVCache",
    ),
    (
        "bytes without us are those of ours",
        "maker = maker.shadowed or (method and method.__get__(model))",
        "pass",
    ),
]

_SERVER = [
    (
        "the store is not told what is pinned",
        "                self.prompt_cache.pinned = n\n",
        "                pass\n",
    ),
    (
        "no token is left to be read",
        "len(tokens) - max(1, len(rest))",
        "len(tokens) - len(rest)",
    ),
    (
        "tokens that a layer has not seen are not read",
        "return caches, tokens[common:]",
        "return caches, rest or tokens[-1:]",
    ),
    (
        "layers that are ahead stay so",
        "return can and cache.trim(n) == n",
        "return can",
    ),
    (
        "a prompt that pins otherwise is gone on with",
        "return cache.rule == options.rule.pinning(self.pinned)",
        "return True",
    ),
    (
        "a draft model pins nothing",
        "for model in (provider.model, provider.draft_model):",
        "for model in (provider.model,):",
    ),
    (
        "a conversation that begins otherwise is pinned",
        "return len(begins) if prompt[: len(begins)] == begins else 0",
        "return len(begins)",
    ),
    (
        "completions are pinned as chats",
        'if request.request_type != "chat" or not tokenizer.has_chat_template:',
        "if not tokenizer.has_chat_template:",
        (),
        "Equivalent: the prompt of a completion is the same whatever the messages, so "
        "nothing differs after a beginning, which is 0 tokens then too.",
    ),
    (
        "the first question is pinned",
        'told = lambda m: m["role"] == "system"  # noqa: E731',
        "told = lambda m: True  # noqa: E731",
    ),
    (
        "a template's beginning is a token too long",
        "return one[: next(differ, 0)]",
        "return one[: next(differ, 0) + 1]",
    ),
    (
        "a draft model beside fewer caches is taken",
        "    if caches != layers:\n",
        "    if caches > layers:\n",
    ),
    (
        "a model that mixes rows reads batches",
        "self.is_batchable and self._takes_rows(self.model)",
        "self.is_batchable",
    ),
    (
        "as many rows are tried as models have KV heads",
        "_MANY = 97",
        "_MANY = 2",
    ),
    (
        "a model that is refused stays loaded",
        "                self.reset()\n                raise\n",
        "                raise\n",
    ),
    (
        "a model is loaded when the first request comes",
        "        self.load_default()\n",
        "",
    ),
    (
        "any number of drafts may be asked for",
        'self._validate("num_draft_tokens", int, max_val=max_draft_tokens)',
        'self._validate("num_draft_tokens", int)',
    ),
    (
        "a state-space layer is brought back",
        "if common <= 0 or (back and len(placed) < len(parts)):",
        "if common <= 0:",
    ),
    (
        "a layer without a cache finds no owner",
        "owner = shared_with(keys) if cache is None else cache",
        "owner = cache",
    ),
    (
        "sinks do not come to our caches",
        "return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)",
        "return attend(queries, keys, values, scale=scale, mask=mask)",
    ),
    (
        "mlx-lm's own attention gets no sinks",
        "return theirs(queries, keys, values, cache, scale, mask, sinks)",
        "return theirs(queries, keys, values, cache, scale, mask)",
    ),
    (
        "our classes are named in the wrong order",
        "        setattr(mlx_lm_cache, kind.__name__, kind)\n",
        "        setattr(mlx_lm_cache, kind.__name__, kinds[0])\n",
        ("test_saved.py",),
    ),
    (
        "classes of others are unnamed",
        "if getattr(mlx_lm_cache, kind.__name__, None) is kind:",
        "if getattr(mlx_lm_cache, kind.__name__, None) is not None:",
    ),
    (
        "what was replaced is forgotten",
        "        theirs = original(getattr(home, name))\n"
        "        setattr(new, _MARK, theirs)\n"
        "        for",
        "        theirs = original(getattr(home, name))\n        for",
    ),
    (
        "a function for one module goes into all",
        "if only_in in (None, module.__name__):",
        "if True:",
        ("test_journal.py",),
    ),
    (
        "our own modules are replaced too",
        'if module.__name__.partition(".")[0] != package:',
        "if True:",
    ),
]


def _all(area: str, given: list) -> list[Mutant]:
    return [Mutant(name, area, *edit) for name, *edit in given]


KEEPING = [
    *_all("storage", _STORAGE),
    *_all("archive", _ARCHIVE),
    *_all("saved", _SAVED),
    *_all("conversion", _CONVERSION),
    *_all("server", _SERVER),
]
