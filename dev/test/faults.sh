#!/usr/bin/env bash
# faults.sh: mutation tests. Plants one fault at a time in a copy of the sources and runs the tests that should
# notice it. Prints a line for each fault. Fails if a fault is missed or cannot be planted.
set -u
cd "$(dirname "$0")/../.." || exit 1
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
noticed=0 missed=0

# Only the objects of a file with a fault are compiled again.
export OMP_WAIT_POLICY=passive
mkdir -p "$T/src/data" && cp -r Makefile ./*.[ch] fsa llmc dev "$T/src/" && cp data/*.c "$T/src/data/"

# fault NAME FILE SED_EXPRESSION TESTS: plants a fault by a sed expression, which must change the file.
fault() {
    sed -i -E "$3" "$T/src/$2"
    if cmp -s "$2" "$T/src/$2"; then
        echo "NOT PLANTED  $1"
        missed=$((missed + 1))
        return
    fi
    local failed=0 by=""
    for test in $4; do
        (cd "$T/src" && make -s CFLAGS=-O1 "build/$test" >/dev/null 2>"$T/err") || { by="the compiler"; failed=1; break; }
        (cd "$T/src" && exec "build/$test" >"$T/out" 2>&1) 2>/dev/null || { by="$by $test ($(grep -c FAILED "$T/out") checks)"; failed=1; }
    done
    cp "$2" "$T/src/$2"
    if [ $failed -eq 1 ]; then
        echo "noticed      $1: $by"
        noticed=$((noticed + 1))
    else
        echo "MISSED       $1"
        missed=$((missed + 1))
    fi
}

A="test_reference test_golden"
R=fsa/reference.c
fault "each window counts only for its first block (block j misses window 4j-1)" $R 's/cell < c->cmp_len \/ s; cell/cell < 1; cell/' "$A"
fault "scores of the group's first head instead of the sum over the group" $R 's/for \(int r = 0; r < g; r\+\+\) (p \+= EXP)/for (int r = 0; r < 1; r++) \1/' "$A"
fault "a tie selects the larger block index" $R 's/scores\[j\] > scores\[argmax\]/scores[j] >= scores[argmax]/' "$A"
fault "causal mask off by one" $R 's/case FSA_CAUSAL: r\[0\].end = pos \+ 1/case FSA_CAUSAL: r[0].end = pos/; s/(r\[0\]\.end = pos) \+ 1;$/\1;/' "$A"
fault "no causal limit within the query's own block" $R 's/if \(end > pos \+ 1\) end = pos \+ 1;/if (end > pos + 2) end = pos + 2;/' "$A"
fault "a window is visible before its last token" $R 's/return fsa_num_windows\(c, pos \+ 1\)/return fsa_num_windows(c, pos + 2)/' "$A"
fault "sliding window of W + 1 tokens" $R 's/r\[0\]\.begin = pos \+ 1 - c->window/r[0].begin = pos - c->window > 0 ? pos - c->window : 0/' "$A"
fault "compressed keys rotated to the next position" $R 's/\(kc, m, c->kv_heads, c->head_dim, 0, c->cmp_stride/(kc, m, c->kv_heads, c->head_dim, 1, c->cmp_stride/' "$A"
fault "the initial blocks are not always selected" $R 's/j < c->init_blocks; j\+\+\) scores\[j\] = INFINITY/j < 0; j++) scores[j] = INFINITY/' "$A"
fault "one local block too few" $R 's/j = blocks - c->local_blocks; j < blocks/j = blocks - c->local_blocks + 1; j < blocks/' "$A"
fault "lse 0 for a row without visible keys" $R 's/max \+ LOG\(sum\) : -INFINITY/max + LOG(sum) : 0/' "$A"
fault "queries of a segment rotated from position 0" $R 's/b->segments\[s\]\.pos, 1, inv_freq/0, 1, inv_freq/' "$A"
fault "position embedding missing in the weight's gradient" $R 's/axpy\(dw \+ row, x\[r \* stride \+ i\] \+ \(pe \? pe\[r \* d \+ i\] : 0\)/axpy(dw + row, x[r * stride + i]/' "$A"
fault "the gate's gradient without 1 - g" $R 's/\* gate \* \(1 - gate\)/* gate/' "$A"
fault "RoPE angles in float" $R 's/double angle = \(double\)\(first/float angle = (float)(first/' "$A"
M="test_model test_model_golden"
fault "RMSNorm's gradient without the term of the mean" train_gpt_nsa.c 's/- xi\[j\] \* rstd\[i\] \* mean//' "$M"
fault "the derivative of SiLU is the sigmoid" train_gpt_nsa.c 's/ \* \(1 \+ gate\[j\] \* \(1 - s\)\)//' "$M"
fault "weight decay on norms too" train_gpt_nsa.c 's/tensor->decay \? lr \* weight_decay : 0/lr * weight_decay/' "test_model"
fault "AdamW without bias correction" train_gpt_nsa.c 's/lr \/ bias_correction1/lr/' "test_model"
fault "samples overlap by a token" llmc/dataloader.h 's/(->count|\.count) \/ \(l->seq_len \+ 1\)/\1 \/ l->seq_len/' "test_data"
fault "checksums of checkpoint chunks are not compared" llmc/checkpoint.h 's/else if \(checksum\(data.*$/else if (0) {/' "test_run"
fault "a pre-token of white space keeps its last character" llmc/tokenizer.h 's/if \(at_text_end \|\| span == first_bytes\) return span/return span/' "test_data"
fault "the last rank does not own the remainder of a layer" llmc/zero.h 's/rank < z->ranks - 1 \? \*begin \+ unit->partition_size : unit->end/*begin + unit->partition_size/' "test_parallel"
fault "context-parallel chunks are not balanced by work" llmc/context_parallel.h 's/ \|\| sum\[r\] < sum\[min_rank\]//' "test_parallel"
fault "positions of a context-parallel slice begin at 0" llmc/context_parallel.h 's/pos = first - cu_seqlens\[s\]/pos = 0/' "test_parallel"
fault "all ranks read the samples of rank 0" llmc/dataloader.h 's/l->position \+ l->rank \* l->batch/l->position/' "test_parallel"
fault "the end of a process is not detected" llmc/comm.c 's/if \(closed\) (comm_die\(c, "rank %d is gone: its process ended without)/if (0) \1/; s/(COMM_HEARTBEAT, NULL, 0\)) \&\& comm_receive\(p\)/\1 \&\& 0/' "test_comm"
fault "a missing heartbeat is not detected" llmc/comm.c 's/now - p->last_received > COMM_TIMEOUT_SECONDS/0/' "test_comm"
fault "two processes may connect with the same rank" llmc/comm.c 's/ \|\| s->peers\[h\.rank\]\.fd >= 0//' "test_comm"
echo "$noticed noticed, $missed missed"
[ $missed -eq 0 ]
