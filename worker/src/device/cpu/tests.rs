//! Kernels beside their twins: short, slow, in double precision; over a grid of shapes, on every instruction set that
//! this processor has. Seeds are fixed and printed.

use super::{
    attention::{AttentionTile, Kv, Scratch},
    buffer::{Buffer, Rows},
    matmul::{Matrix, Which, multiply},
    rowwise::{RmsNorm, SiluMul, rotate},
    simd::{Isa, Kernel, LANES, Lanes, exp},
    team::Team,
};
use crate::device::{Heads, KvShape};

fn random(seed: u64) -> fastrand::Rng {
    println!("seed {seed}");
    fastrand::Rng::with_seed(seed)
}

fn numbers(random: &mut fastrand::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.f32() * 2.0 - 1.0).collect()
}

fn rows_of(values: &[f32], n: usize, width: usize) -> Rows {
    let mut rows = Rows::new(n, width).expect("memory");
    for (i, value) in values.chunks_exact(width).enumerate() {
        let stride = rows.stride;
        rows.data[i * stride..][..width].copy_from_slice(value);
    }
    rows
}

/// All rows, one after the other.
fn contents(rows: &Rows, n: usize) -> Vec<f32> {
    (0..n).flat_map(|row| rows.row(row).to_vec()).collect()
}

#[track_caller]
fn close(got: &[f32], want: &[f64], bound: f64, context: &str) {
    assert_eq!(got.len(), want.len(), "{context}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(got) - want).abs() <= bound,
            "{context}: element {i}: {got} is not {want}"
        );
    }
}

fn matrix(team: &Team, values: &[f32], outs: usize, ins: usize) -> Matrix {
    let mut matrix = Matrix::new(outs, ins).expect("memory");
    // In two parts that meet within a panel, as fused matrices are filled.
    let cut = outs / 3;
    matrix.fill(team, cut, &values[cut * ins..]);
    matrix.fill(team, 0, &values[..cut * ins]);
    matrix
}

fn product(isa: Isa, team: &Team, x: &Rows, which: Which<'_>, m: usize, w: &Matrix) -> Vec<f32> {
    let mut packed = Buffer::new(m * w.ins, "test").expect("memory");
    let mut out = Rows::new(m, w.outs).expect("memory");
    multiply((isa, team), &mut packed, x, which, w, out.shared());
    contents(&out, m)
}

#[test]
fn products_equal_their_twin_and_do_not_depend_on_the_batch() {
    let mut random = random(1);
    let teams = [Team::new("test", 1, true), Team::new("test", 3, true)];
    for (outs, ins) in [
        (1, 1),
        (15, 7),
        (16, 256),
        (17, 257),
        (48, 512),
        (100, 600),
        (33, 1000),
    ] {
        let w = numbers(&mut random, outs * ins);
        let x = numbers(&mut random, 150 * ins);
        let dot = |m: usize, n: usize| -> f64 {
            (0..ins)
                .map(|k| f64::from(x[m * ins + k]) * f64::from(w[n * ins + k]))
                .sum()
        };
        let want: Vec<f64> = (0..150)
            .flat_map(|m| (0..outs).map(move |n| (m, n)))
            .map(|(m, n)| dot(m, n))
            .collect();
        let (matrix, rows) = (matrix(&teams[1], &w, outs, ins), rows_of(&x, 150, ins));
        for isa in Isa::available() {
            let all = product(isa, &teams[0], &rows, Which::First(150), 150, &matrix);
            close(
                &all,
                &want,
                1e-5 * (ins as f64).sqrt(),
                &format!("{} {outs} x {ins}", isa.name()),
            );
            for m in [1, 2, 3, 5, 8, 13, 64, 65, 100] {
                for team in &teams {
                    let some = product(isa, team, &rows, Which::First(m), m, &matrix);
                    assert_eq!(some, all[..m * outs], "{} {outs} x {ins}, {m} rows", isa.name());
                }
            }
            let chosen = [149, 0, 77];
            let some = product(isa, &teams[1], &rows, Which::These(&chosen), 3, &matrix);
            for (got, row) in some.chunks_exact(outs).zip(chosen) {
                assert_eq!(got, &all[row * outs..][..outs]);
            }
        }
        let mut read = vec![0.0; ins];
        matrix.read(outs - 1, &mut read);
        assert_eq!(read, w[(outs - 1) * ins..]);
    }
}

/// Both have fused multiply-add and the same logical lanes.
#[test]
fn avx512_and_avx2_give_the_same_bits() {
    let sets: Vec<Isa> = Isa::available()
        .into_iter()
        .filter(|isa| isa.name() != "portable")
        .collect();
    let mut random = random(2);
    let (w, x) = (numbers(&mut random, 50 * 300), numbers(&mut random, 9 * 300));
    let team = Team::new("test", 1, true);
    let (matrix, rows) = (matrix(&team, &w, 50, 300), rows_of(&x, 9, 300));
    let products: Vec<_> = sets
        .iter()
        .map(|&isa| product(isa, &team, &rows, Which::First(9), 9, &matrix))
        .collect();
    assert!(products.windows(2).all(|pair| pair[0] == pair[1]));
}

struct Case {
    heads: Heads,
    block_tokens: usize,
    n_tokens: usize,
}

/// Keys and values of one sequence in scattered blocks, and queries of all its positions.
struct Sequence {
    kv: Kv,
    blocks: Vec<u32>,
    qkv: Rows,
}

impl Case {
    fn sequence(&self, random: &mut fastrand::Rng) -> Sequence {
        let Case {
            heads,
            block_tokens,
            n_tokens,
        } = *self;
        let n_blocks = n_tokens.div_ceil(block_tokens) + 3;
        let mut kv = Kv::new(KvShape {
            n_layers: 2,
            n_blocks,
            block_tokens,
            heads,
        })
        .expect("memory");
        let mut blocks: Vec<u32> = (0..n_blocks as u32).collect();
        random.shuffle(&mut blocks);
        let values = numbers(random, n_tokens * heads.qkv_width());
        let qkv = rows_of(&values, n_tokens, heads.qkv_width());
        let writer = kv.writer();
        for token in 0..n_tokens {
            let row = qkv.row(token);
            let place = blocks[token / block_tokens] as usize * block_tokens + token % block_tokens;
            for head in 0..heads.n_kv {
                let k = &row[(heads.n_q + head) * heads.dim..][..heads.dim];
                let v = &row[(heads.n_q + heads.n_kv + head) * heads.dim..][..heads.dim];
                // SAFETY: one thread.
                unsafe { writer.write(1, place, head, k, v) };
            }
        }
        Sequence { kv, blocks, qkv }
    }

    fn attend(&self, isa: Isa, sequence: &Sequence, rows_a_tile: usize) -> Vec<f32> {
        let Case { heads, n_tokens, .. } = *self;
        let mut out = Rows::new(n_tokens, heads.n_q * heads.dim).expect("memory");
        let mut scratch = Scratch::default();
        for kv_head in 0..heads.n_kv {
            for row in (0..n_tokens).step_by(rows_a_tile) {
                isa.run(AttentionTile {
                    kv: &sequence.kv,
                    layer: 1,
                    heads,
                    blocks: &sequence.blocks,
                    kv_head,
                    row,
                    position: row,
                    n_rows: rows_a_tile.min(n_tokens - row),
                    qkv: &sequence.qkv,
                    out: out.shared(),
                    scratch: &mut scratch,
                });
            }
        }
        contents(&out, n_tokens)
    }

    /// Softmax over all earlier positions at once.
    fn twin(&self, sequence: &Sequence) -> Vec<f64> {
        let Case { heads, n_tokens, .. } = *self;
        let at =
            |token: usize, head: usize, d: usize| f64::from(sequence.qkv.row(token)[head * heads.dim + d]);
        let mut out = Vec::new();
        for token in 0..n_tokens {
            for q in 0..heads.n_q {
                let k = heads.n_q + q / (heads.n_q / heads.n_kv);
                let score = |t: usize| -> f64 { (0..heads.dim).map(|d| at(token, q, d) * at(t, k, d)).sum() };
                let weights: Vec<f64> = (0..=token)
                    .map(|t| (score(t) / (heads.dim as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..heads.dim).map(|d| {
                    (0..=token)
                        .map(|t| weights[t] * at(t, k + heads.n_kv, d))
                        .sum::<f64>()
                        / total
                }));
            }
        }
        out
    }
}

#[test]
fn attention_equals_its_twin_and_does_not_depend_on_tiles() {
    let mut random = random(3);
    let shapes = [
        (1, 1, 2),
        (2, 1, 8),
        (4, 2, 16),
        (6, 1, 24),
        (9, 3, 64),
        (4, 4, 40),
    ];
    for (n_q, n_kv, dim) in shapes {
        for block_tokens in [1, 5, 16, 32, 40] {
            let case = Case {
                heads: Heads { n_q, n_kv, dim },
                block_tokens,
                n_tokens: 70,
            };
            let sequence = case.sequence(&mut random);
            let want = case.twin(&sequence);
            for isa in Isa::available() {
                let context = format!(
                    "{} {n_q}/{n_kv} heads of {dim}, blocks of {block_tokens}",
                    isa.name()
                );
                let alone = case.attend(isa, &sequence, 1);
                close(&alone, &want, 1e-5, &context);
                for rows_a_tile in [3, 16, 70] {
                    assert_eq!(alone, case.attend(isa, &sequence, rows_a_tile), "{context}");
                }
            }
        }
    }
}

#[test]
fn norm_and_activation_equal_their_twins() {
    let mut random = random(4);
    for n in [1, 15, 16, 100, 576] {
        let (x, w) = (numbers(&mut random, n), numbers(&mut random, n));
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        let norm: Vec<f64> = x
            .iter()
            .zip(&w)
            .map(|(&x, &w)| f64::from(x) / (mean + 1e-5).sqrt() * f64::from(w))
            .collect();
        let gate: Vec<f32> = x.iter().map(|x| x * 30.0).collect();
        let silu: Vec<f64> = gate
            .iter()
            .zip(&w)
            .map(|(&g, &u)| f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u))
            .collect();
        for isa in Isa::available() {
            let mut out = vec![0.0; n];
            isa.run(RmsNorm {
                row: &x,
                weight: &w,
                eps: 1e-5,
                normed: &mut out,
            });
            close(&out, &norm, 1e-6, isa.name());
            isa.run(SiluMul {
                gate: &gate,
                up: &w,
                out: &mut out,
            });
            close(&out, &silu, 1e-5, isa.name());
        }
    }
}

#[test]
fn rotation_keeps_length_and_turns_pairs() {
    let mut head = [1.0, 2.0, 3.0, 4.0];
    let (sin, cos) = 0.5f32.sin_cos();
    rotate(&mut head, &[cos, 1.0], &[sin, 0.0]);
    assert_eq!(head, [cos - 3.0 * sin, 2.0, 3.0 * cos + sin, 4.0]);
}

struct ExpOf<'a>(&'a mut [f32]);

impl Kernel for ExpOf<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        for x in self.0 {
            *x = exp::<S>(*x);
        }
    }
}

#[test]
fn exp_is_close_and_exact_at_zero() {
    let inputs: Vec<f32> = (0..200_000)
        .map(|i| -87.0 + i as f32 * (95.0 / 200_000.0))
        .collect();
    for isa in Isa::available() {
        let mut outputs = inputs.clone();
        isa.run(ExpOf(&mut outputs));
        let error = |(&x, &y): (&f32, &f32)| (f64::from(y) / f64::from(x).exp() - 1.0).abs();
        let worst = inputs.iter().zip(&outputs).map(error).fold(0.0, f64::max);
        assert!(worst < 2.5e-7, "{}: relative error {worst:e}", isa.name());
        let mut special = [0.0, -0.0, f32::NEG_INFINITY, -88.0, f32::NAN];
        isa.run(ExpOf(&mut special));
        assert_eq!(special[..4], [1.0, 1.0, 0.0, 0.0]);
        assert!(special[4].is_nan());
    }
}

#[test]
fn buffers_are_aligned_zeroed_and_counted() {
    let buffer = Buffer::new(17, "test").expect("memory");
    assert_eq!(buffer.as_ptr().align_offset(64), 0);
    assert_eq!((buffer.len(), buffer.bytes()), (2 * LANES, 128));
    assert!(buffer.iter().all(|&x| x == 0.0));
    assert!(Buffer::new(1 << 58, "test").is_err());
}
