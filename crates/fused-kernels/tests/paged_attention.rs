//! Attention over a paged cache against its oracle in f64, on every runtime at hand, and what must not change its bits.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::paged_attention::{self, Attend, Batch, Division, Options, Path, Row, Shape, Write, oracle};
use fused_kernels::{FloatFormat, KernelError, supports};
use half::{bf16, f16};
use test_support::{Random, assert_close, clients, noise};

/// Calls `test` with every client and each format that it has.
fn everywhere(test: impl Fn(&Client, FloatFormat)) {
    for (_, client) in clients() {
        FloatFormat::ALL.into_iter().filter(|format| supports(client, *format)).for_each(|format| test(client, format));
    }
}

/// Whether a 16-bit format repeats what f32 has shown: software Vulkan takes seconds to compile a kernel.
fn repeats(client: &Client, format: FloatFormat) -> bool {
    client.name().contains("wgpu") && format != FloatFormat::F32
}

fn bytes(values: &[f32], format: FloatFormat) -> Vec<u8> {
    match format {
        FloatFormat::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        FloatFormat::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        FloatFormat::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

fn values(bytes: &[u8], format: FloatFormat) -> Vec<f32> {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match format {
        FloatFormat::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        FloatFormat::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
        FloatFormat::BF16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
    }
}

/// The values as `format` holds them.
fn rounded(numbers: &[f32], format: FloatFormat) -> Vec<f32> {
    values(&bytes(numbers, format), format)
}

#[derive(Clone, Copy, Debug)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    fn dims(self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.head_dim]
    }
}

/// Which kernel, and how its work is divided.
#[derive(Clone, Copy)]
enum How {
    On(Path),
    By(Division),
}

/// Sequences whose blocks lie mixed up in one cache of NaNs, filled up to each one's length.
struct World {
    heads: Heads,
    block_tokens: usize,
    blocks: Vec<Vec<u32>>,
    slots: usize,
    /// The length that batches have room for.
    room: usize,
    /// Of each sequence: `[len, heads or kv_heads, head_dim]`.
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    /// One of each query head, if they have some.
    sinks: Option<Vec<f32>>,
}

impl World {
    fn new(seed: u64, heads: Heads, block_tokens: usize, lens: &[usize], format: FloatFormat) -> Self {
        let needed: Vec<usize> = lens.iter().map(|len| len.div_ceil(block_tokens)).collect();
        // One block that belongs to nobody.
        let total = needed.iter().sum::<usize>() + 1;
        let mut numbers: Vec<u32> = (0..total as u32).collect();
        let mut random = Random(seed);
        for i in (1..total).rev() {
            numbers.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
        }
        let blocks = needed.iter().map(|n| numbers.drain(..n).collect()).collect();
        let mut draw = |heads: usize, size: f32| -> Vec<Vec<f32>> {
            let one = |len: &usize| {
                let numbers: Vec<f32> =
                    (0..len * heads).flat_map(|_| random.normals(1)).map(|x: f32| x * size).collect();
                rounded(&numbers, format)
            };
            lens.iter().map(one).collect()
        };
        let Heads { heads: q_heads, kv_heads, head_dim } = heads;
        let (q, k, v) = (draw(q_heads * head_dim, 1.5), draw(kv_heads * head_dim, 1.0), draw(kv_heads * head_dim, 1.0));
        Self { heads, block_tokens, blocks, slots: total * block_tokens, room: 0, q, k, v, sinks: None }
    }

    /// A batch of (sequence, length, new tokens).
    fn batch(&self, rows: &[(usize, usize, usize)]) -> Batch {
        let rows: Vec<Row<'_>> =
            rows.iter().map(|&(of, len, new)| Row { blocks: &self.blocks[of], len, new }).collect();
        Batch::with_room(&rows, self.block_tokens, self.room).unwrap()
    }

    fn shape(&self, format: FloatFormat) -> Shape {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        Shape { heads, kv_heads, head_dim, slots: self.slots, format }
    }

    /// The kernels that take its heads.
    fn paths(&self, client: &Client, format: FloatFormat) -> Vec<Path> {
        paged_attention::paths(client, &self.shape(format))
    }

    /// The new tokens' elements of `of`.
    fn new_tokens(&self, rows: &[(usize, usize, usize)], of: &[Vec<f32>], heads: usize) -> Vec<f32> {
        let width = heads * self.heads.head_dim;
        rows.iter().flat_map(|&(i, len, new)| of[i][(len - new) * width..len * width].to_vec()).collect()
    }

    /// A cache whose slots hold what comes before the new tokens; the rest is NaN.
    fn cache(&self, rows: &[(usize, usize, usize)], of: &[Vec<f32>]) -> Vec<f32> {
        let width = self.heads.kv_heads * self.heads.head_dim;
        let mut cache = vec![f32::NAN; self.slots * width];
        for &(i, len, new) in rows {
            for position in 0..len - new {
                let slot = paged_attention::slot(&self.blocks[i], position, self.block_tokens);
                cache[slot * width..][..width].copy_from_slice(&of[i][position * width..][..width]);
            }
        }
        cache
    }

    /// Writes the new tokens into a cache and attends. Checks the written caches against the host's.
    fn run(
        &self,
        client: &Client,
        format: FloatFormat,
        rows: &[(usize, usize, usize)],
        options: Options,
        how: How,
    ) -> (Vec<f32>, Vec<f64>) {
        let batch = self.batch(rows);
        let words: Vec<u8> = batch.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let words = client.create_from_slice(&words);
        let (shape, width) = (self.shape(format), self.heads.kv_heads * self.heads.head_dim);
        let filled = |of: &[Vec<f32>]| -> (Handle, Vec<f32>) {
            let mut host = self.cache(rows, of);
            let cache = client.create_from_slice(&bytes(&host, format));
            let new = self.new_tokens(rows, of, self.heads.kv_heads);
            let device = client.create_from_slice(&bytes(&new, format));
            let buffers = Write { new: &device, cache: &cache, words: &words };
            paged_attention::write(client, buffers, &batch, self.slots, width, format).unwrap();
            for (token, slot) in batch.slots().iter().enumerate() {
                host[*slot as usize * width..][..width].copy_from_slice(&new[token * width..][..width]);
            }
            let found = values(&client.read_one(cache.clone()).unwrap(), format);
            let same = found.iter().zip(&host).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
            assert!(same, "a cache is not what was written");
            (cache, host)
        };
        let ((keys, host_keys), (values_cache, host_values)) = (filled(&self.k), filled(&self.v));
        let host_q = self.new_tokens(rows, &self.q, self.heads.heads);
        let q = client.create_from_slice(&bytes(&host_q, format));
        let out = client.create_from_slice(&vec![0xFF; host_q.len() * format.size()]);
        let sinks = self.sinks.as_ref().map(|sinks| client.create_from_slice(&bytes(sinks, FloatFormat::F32)));
        let buffers =
            Attend { q: &q, keys: &keys, values: &values_cache, words: &words, sinks: sinks.as_ref(), out: &out };
        match how {
            How::On(path) => paged_attention::attend_on(client, path, buffers, &batch, &shape, options).unwrap(),
            How::By(by) => paged_attention::attend_by(client, buffers, &batch, &shape, options, by).unwrap(),
        }
        let found = values(&client.read_one(out).unwrap(), format);
        let sinks = self.sinks.as_deref();
        let expected = oracle::attend(&host_q, &host_keys, &host_values, &batch, self.heads.dims(), sinks, options);
        (found, expected)
    }
}

fn options(head_dim: usize, window: Option<usize>, softcap: Option<f32>) -> Options {
    Options { scale: 1.0 / (head_dim as f32).sqrt(), window, softcap }
}

/// One rounding to the format, and f32's errors: of a score, some 2^-24 of the sum of its products' magnitudes (below
/// 40 here) or of the cap, which its weight has relative to itself, and sums of values up to 5.
fn near(what: &str, found: &[f32], expected: &[f64], format: FloatFormat, softcap: Option<f32>) {
    let relative = match format {
        FloatFormat::F32 => 6e-8,
        FloatFormat::F16 => 4.9e-4,
        FloatFormat::BF16 => 3.91e-3,
    };
    let f32_error = 2e-5 + 1e-6 * f64::from(softcap.unwrap_or(0.0));
    assert_close(format!("{what}, {format:?}"), found, expected, |_, e: f64| relative * e.abs() + f32_error);
}

#[test]
fn heads_of_every_shape() {
    let shapes = [
        (1, 1, 16),
        (2, 1, 17),
        (6, 2, 64),
        (8, 2, 80),
        (5, 1, 96),
        (7, 1, 128),
        (8, 1, 64),
        (11, 1, 24),
        (12, 1, 40),
        (16, 1, 32),
        (2, 2, 250),
        (4, 2, 255),
        (4, 1, 256),
        (1, 1, 1),
        // More query heads to a key head than one tile has, and than two have.
        (12, 1, 128),
        (40, 2, 64),
        (19, 1, 192),
        // Wider than any head of keys: what latent attention keeps of a token.
        (16, 1, 576),
        (5, 1, 260),
        (2, 1, 1024),
        (6, 3, 8),
    ];
    everywhere(|client, format| {
        for (number, (heads, kv_heads, head_dim)) in shapes.into_iter().enumerate() {
            if repeats(client, format) && number % 4 != 0 {
                continue;
            }
            let heads = Heads { heads, kv_heads, head_dim };
            let world = World::new(number as u64, heads, 16, &[37, 5, 70], format);
            // Decoding, a whole prompt, and a chunk of one.
            let rows = [(0, 37, 1), (1, 5, 5), (2, 70, 23)];
            let options = options(head_dim, None, None);
            for path in world.paths(client, format) {
                let (found, expected) = world.run(client, format, &rows, options, How::On(path));
                near(&format!("{heads:?}, {path:?}"), &found, &expected, format, None);
            }
        }
    });
}

#[test]
fn windows_caps_and_blocks() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 32 };
    everywhere(|client, format| {
        for (number, block_tokens) in [1, 3, 16, 32, 100].into_iter().enumerate() {
            for (window, softcap) in [(None, Some(3.0)), (Some(1), None), (Some(20), None), (Some(64), Some(30.0))] {
                let world = World::new(number as u64, heads, block_tokens, &[1, 64, 130, 33], format);
                let rows = [(0, 1, 1), (1, 64, 64), (2, 130, 1), (3, 33, 2)];
                for path in world.paths(client, format) {
                    let what = format!("{path:?}, blocks of {block_tokens}, window {window:?}, cap {softcap:?}");
                    let options = options(32, window, softcap);
                    let (found, expected) = world.run(client, format, &rows, options, How::On(path));
                    near(&what, &found, &expected, format, softcap);
                }
            }
        }
    });
}

/// Beside scores of their size and far above them; where a row is one split, and where splits are joined.
#[test]
fn sinks_take_their_share() {
    everywhere(|client, format| {
        for (heads, size) in [
            (Heads { heads: 8, kv_heads: 1, head_dim: 64 }, 3.0),
            (Heads { heads: 6, kv_heads: 2, head_dim: 40 }, 3.0),
            (Heads { heads: 3, kv_heads: 3, head_dim: 17 }, 200.0),
        ] {
            let mut world = World::new(7, heads, 16, &[700, 1, 33, 2300], format);
            world.sinks = Some(noise(8, heads.heads).into_iter().map(|x| x * size).collect());
            let rows = [(0, 700, 1), (1, 1, 1), (2, 33, 20), (3, 2300, 2)];
            for (path, window) in
                world.paths(client, format).into_iter().flat_map(|path| [(path, None), (path, Some(128))])
            {
                let options = options(heads.head_dim, window, None);
                let (found, expected) = world.run(client, format, &rows, options, How::On(path));
                let what = format!("{heads:?}, {path:?}, sinks of {size}, window {window:?}");
                near(&what, &found, &expected, format, None);
                // Of wide heads, four tokens are more than some devices have shared memory for.
                for by in divisions(path).into_iter().filter(|_| heads.head_dim < 64) {
                    let (other, _) = world.run(client, format, &rows, options, How::By(by));
                    assert!(same(&found, &other), "{what}, {by:?}: not the same bits, {format:?}");
                }
            }
        }
    });
}

#[test]
fn long_contexts_are_split_and_joined() {
    let heads = Heads { heads: 3, kv_heads: 1, head_dim: 16 };
    everywhere(|client, format| {
        let world = World::new(5, heads, 16, &[1300, 256, 257, 4], format);
        let rows = [(0, 1300, 1), (1, 256, 1), (2, 257, 2), (3, 4, 1)];
        for window in [None, Some(300)] {
            let options = options(16, window, None);
            for path in world.paths(client, format) {
                let (found, expected) = world.run(client, format, &rows, options, How::On(path));
                near(&format!("{path:?}, window {window:?}"), &found, &expected, format, None);
                // In cubes of their own or in one, and however many tokens share a cube.
                for by in divisions(path) {
                    let (other, _) = world.run(client, format, &rows, options, How::By(by));
                    assert!(same(&found, &other), "{by:?}, window {window:?}: not the same bits, {format:?}");
                }
            }
        }
    });
}

fn divisions(path: Path) -> Vec<Division> {
    match path {
        Path::Portable => [(true, 1), (false, 1), (true, 4), (false, 4)]
            .map(|(splits_apart, tokens)| Division::Portable { splits_apart, tokens })
            .to_vec(),
        Path::Mma => [(false, 1, 1), (true, 1, 3), (false, 2, 500), (true, 2, 8)]
            .map(|(whole_sections, query_tiles, cubes)| Division::Mma { whole_sections, query_tiles, cubes })
            .to_vec(),
    }
}

/// Splits of 128 positions, sections of 2,048: more than one section, borders of both, windows that begin and end on them
/// and beside them, a window within a split, and rows that end with a section.
#[test]
fn sections_are_joined() {
    let heads = Heads { heads: 6, kv_heads: 2, head_dim: 40 };
    everywhere(|client, format| {
        let lens = [4500, 2048, 2049, 128, 129, 4096];
        let world = World::new(6, heads, 16, &lens, format);
        let rows = [(0, 4500, 1), (1, 2048, 1), (2, 2049, 2), (3, 128, 1), (4, 129, 1), (5, 4096, 3)];
        for path in world.paths(client, format).into_iter().filter(|path| *path != Path::Portable) {
            for window in [None, Some(2048), Some(2049), Some(128), Some(100), Some(3000)] {
                let options = options(40, window, None);
                let (found, expected) = world.run(client, format, &rows, options, How::On(path));
                near(&format!("{path:?}, window {window:?}"), &found, &expected, format, None);
                for by in divisions(path) {
                    let (other, _) = world.run(client, format, &rows, options, How::By(by));
                    assert!(same(&found, &other), "{by:?}, window {window:?}: not the same bits, {format:?}");
                }
            }
        }
    });
}

/// A launch takes 512 rows. Many of these have nothing new, and partial results of the others are read by other cubes.
#[test]
fn rows_beyond_one_launch() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 64 };
    everywhere(|client, format| {
        let world = World::new(7, heads, 16, &[300, 40], format);
        let rows: Vec<_> = (0..1100).map(|i| if i % 3 == 0 { (0, 300, 1) } else { (1, 1 + i % 40, i % 2) }).collect();
        for path in world.paths(client, format).into_iter().filter(|path| *path != Path::Portable) {
            let options = options(64, None, None);
            let (found, expected) = world.run(client, format, &rows, options, How::On(path));
            near(&format!("{path:?}"), &found, &expected, format, None);
        }
    });
}

/// A batch with more room than its rows use gives the same bits, launch after launch: the counters go back to zero.
#[test]
fn room_changes_nothing() {
    let heads = Heads { heads: 4, kv_heads: 1, head_dim: 64 };
    everywhere(|client, format| {
        let mut world = World::new(8, heads, 16, &[700, 130], format);
        let rows = [(0, 700, 1), (1, 130, 1)];
        let options = options(64, None, None);
        for path in world.paths(client, format) {
            world.room = 0;
            let (alone, expected) = world.run(client, format, &rows, options, How::On(path));
            near(&format!("{path:?}"), &alone, &expected, format, None);
            for room in [701, 1024, 8192, 0] {
                world.room = room;
                let (found, _) = world.run(client, format, &rows, options, How::On(path));
                assert!(same(&found, &alone), "{path:?}, room {room}: not the same bits, {format:?}");
            }
        }
    });
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn a_token_does_not_depend_on_its_batch_or_chunk() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 24 };
    everywhere(|client, format| {
        let world = World::new(9, heads, 16, &[300, 70, 12, 45], format);
        for (window, softcap) in [(None, None), (Some(40), Some(20.0))] {
            let options = options(24, window, softcap);
            let width = heads.heads * heads.head_dim;
            for path in world.paths(client, format) {
                // Of each sequence, every token: in one chunk of its own.
                let alone: Vec<Vec<f32>> = [300, 70, 12, 45]
                    .into_iter()
                    .enumerate()
                    .map(|(of, len)| world.run(client, format, &[(of, len, len)], options, How::On(path)).0)
                    .collect();
                let batches: [&[(usize, usize, usize)]; 4] = [
                    &[(0, 300, 300), (1, 70, 1), (2, 12, 12), (3, 45, 3)],
                    &[(2, 1, 1), (0, 299, 7), (1, 33, 33)],
                    &[(3, 31, 1), (1, 70, 37), (0, 257, 1)],
                    &[(0, 100, 1), (1, 70, 69), (2, 11, 1), (3, 45, 45)],
                ];
                for rows in batches {
                    let (found, _) = world.run(client, format, rows, options, How::On(path));
                    let mut token = 0;
                    for &(of, len, new) in rows {
                        let (found, expected) =
                            (&found[token * width..][..new * width], &alone[of][(len - new) * width..len * width]);
                        assert!(
                            same(found, expected),
                            "sequence {of} of {rows:?}, window {window:?}, {path:?}, {format:?}"
                        );
                        token += new;
                    }
                }
            }
        }
    });
}

#[test]
fn rows_may_be_empty_and_share_blocks() {
    everywhere(|client, format| {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 8 };
        let mut world = World::new(3, heads, 8, &[24, 20], format);
        // A common prefix of two blocks.
        let width = heads.head_dim;
        (world.blocks[1][0], world.blocks[1][1]) = (world.blocks[0][0], world.blocks[0][1]);
        let (k, v) = (world.k[0][..16 * width].to_vec(), world.v[0][..16 * width].to_vec());
        world.k[1][..16 * width].copy_from_slice(&k);
        world.v[1][..16 * width].copy_from_slice(&v);
        let rows = [(0, 24, 0), (0, 24, 3), (1, 20, 0), (1, 20, 4), (0, 0, 0)];
        for path in world.paths(client, format) {
            let (found, expected) = world.run(client, format, &rows, options(8, None, None), How::On(path));
            near(&format!("shared blocks, {path:?}"), &found, &expected, format, None);
            let (found, _) = world.run(client, format, &[(0, 5, 0)], options(8, None, None), How::On(path));
            assert!(found.is_empty());
        }
    });
}

#[test]
fn far_scores_stay_finite() {
    everywhere(|client, format| {
        for head_dim in [4, 8] {
            let heads = Heads { heads: 1, kv_heads: 1, head_dim };
            let mut world = World::new(4, heads, 4, &[40], format);
            for (i, k) in world.k[0].iter_mut().enumerate() {
                *k = if i / head_dim % 2 == 0 { 200.0 } else { -200.0 };
            }
            let signs = noise(1, 40 * head_dim);
            world.q[0] = signs.iter().map(|x| rounded(&[x.signum() * 100.0], format)[0]).collect();
            for path in world.paths(client, format) {
                let options = options(head_dim, None, None);
                let (found, expected) = world.run(client, format, &[(0, 40, 40)], options, How::On(path));
                near(&format!("far scores, {path:?}"), &found, &expected, format, None);
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_named() {
    let row = |blocks, len, new| Batch::new(&[Row { blocks, len, new }], 16);
    assert!(matches!(row(&[1], 4, 5), Err(KernelError::Attention { name: "row", .. })));
    assert!(matches!(row(&[1], 17, 1), Err(KernelError::Attention { name: "row", .. })));
    assert!(matches!(row(&[u32::MAX], 1, 1), Err(KernelError::TooLarge { name: "slots", .. })));
    assert!(matches!(Batch::new(&[], 0), Err(KernelError::Attention { name: "block_tokens", .. })));
    let batch = row(&[3], 4, 2).unwrap();
    assert_eq!((batch.reach(), batch.slots(), batch.max_new(), batch.max_len()), (64, &[50, 51][..], 2, 4));
    everywhere(|client, format| {
        let handle = client.empty(64 * 8 * 4);
        let run = |heads, kv_heads, head_dim, slots, options| {
            let buffers =
                Attend { q: &handle, keys: &handle, values: &handle, words: &handle, sinks: None, out: &handle };
            let shape = Shape { heads, kv_heads, head_dim, slots, format };
            paged_attention::attend(client, buffers, &batch, &shape, options).unwrap_err()
        };
        let plain = options(8, None, None);
        let buffers = Attend { q: &handle, keys: &handle, values: &handle, words: &handle, sinks: None, out: &handle };
        let shape = Shape { heads: 1, kv_heads: 1, head_dim: 8, slots: 64, format };
        for tokens in [0, 1 << 20] {
            let division = Division::Portable { splits_apart: false, tokens };
            let error = paged_attention::attend_by(client, buffers, &batch, &shape, plain, division).unwrap_err();
            assert!(matches!(error, KernelError::Attention { name: "tokens of a cube", .. }), "{error}");
        }
        if let Some(path) = paged_attention::paths(client, &shape).into_iter().find(|path| *path != Path::Portable) {
            for (query_tiles, cubes) in [(0, 1), (3, 1), (1, 0)] {
                let by = Division::Mma { whole_sections: false, query_tiles, cubes };
                let error = paged_attention::attend_by(client, buffers, &batch, &shape, plain, by).unwrap_err();
                assert!(matches!(error, KernelError::Attention { name: "eights of queries", .. }), "{error}");
            }
            let narrow = Shape { head_dim: 4, ..shape };
            let error = paged_attention::attend_on(client, path, buffers, &batch, &narrow, plain).unwrap_err();
            assert_eq!(error, KernelError::HeadDim(4));
        } else {
            assert!(paged_attention::attend_on(client, Path::Mma, buffers, &batch, &shape, plain).is_err());
        }
        assert_eq!(run(3, 2, 4, 64, plain), KernelError::Heads { heads: 3, kv_heads: 2 });
        assert!(matches!(run(1, 1, 257, 64, plain), KernelError::Shape { .. }));
        assert!(matches!(run(1, 1, 8, 63, plain), KernelError::TooLarge { .. }));
        assert!(matches!(run(1, 1, 256, 64, plain), KernelError::BufferSize { .. }));
        for wrong in [
            Options { window: Some(0), ..plain },
            Options { softcap: Some(0.0), ..plain },
            Options { scale: f32::NAN, ..plain },
        ] {
            assert!(matches!(run(1, 1, 8, 64, wrong), KernelError::Attention { .. }));
        }
    });
}
