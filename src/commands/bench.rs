//! `bench train`: measures training steps on random tokens, with every position labelled, as in PEFT's benchmark. Every
//! phase of a step ends when the device has finished its work.
//! `bench matmul`: measures matrix products, which bound their speed.
//! `bench generate`: measures greedy decoding.

use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use monteclora_adapters::methods::monteclora::{MonteCloraConfig, Preset};
use monteclora_adapters::noise::{Key, Purpose};
use monteclora_adapters::product::{Factor, Product, sum_of_products};
use monteclora_adapters::weights::{AUTO_BF16, BF16, Bf16, Kind, Weight};
use monteclora_adapters::{Precision, methods};
use monteclora_converters::{AdapterConfig, ModelFiles, Problem, TargetModules};
use serde_json::json;

use super::{device, print, print_json, weight_type};
use crate::cli::{BenchGenerateArgs, BenchMatmulArgs, BenchMethod, BenchTrainArgs};
use crate::config::{DtypeChoice, TrainConfig};
use crate::data::BatchOptions;
use crate::hub;
use crate::model::{ActiveAdapter, Decoder, GenerationSettings, PassOptions, Sequences};
use crate::train::memory::{MemoryEstimate, MemoryInputs, PROGRAM};
use crate::train::metrics::peak_memory_bytes;
use crate::train::{AdamW, AdapterState, device_name};

pub(super) fn run(args: &BenchTrainArgs) -> Result<()> {
    let (weights, precision) = match (args.bf16, args.model.options.dtype) {
        (false, dtype) => (weight_type(dtype)?, Precision::Single),
        (true, DtypeChoice("auto")) => (&AUTO_BF16, Precision::Bf16),
        (true, DtypeChoice("bf16")) => (&BF16, Precision::Bf16),
        (true, _) => {
            let message = "--bf16 holds the weights in bfloat16; leave out --dtype or give bf16";
            bail!(Problem::usage(message.to_owned()));
        }
    };
    let counts = [args.batch, args.num_samples, args.rank];
    if counts.contains(&0) || args.seq < 2 || args.steps < 2 {
        bail!(Problem::usage(
            "bench train needs --seq and --steps of at least 2; --batch, --num-samples and --rank of at least 1",
        ));
    }
    at_most(
        "bench train",
        &[
            args.batch,
            args.num_samples,
            args.rank,
            args.seq,
            args.steps,
        ],
    )?;
    let began = Instant::now();
    let base = hub::locate(args.model.id()?, &args.model.options.hub())?;
    let device = device(args.model.options.cpu)?;
    let decoder =
        decoder(&base.dir, &device, weights, args.random_weights)?.with_precision(precision);
    let config = AdapterConfig {
        r: args.rank,
        lora_alpha: 2.0 * args.rank as f64,
        target_modules: TargetModules::AllLinear,
        ..AdapterConfig::default()
    };
    let sites = config.resolve_targets(&Decoder::linear_modules(decoder.config()))?;
    let name = match args.method {
        BenchMethod::Monteclora => "monteclora",
        BenchMethod::Lora => "lora",
    };
    let config_of = MonteCloraConfig {
        num_samples: args.num_samples,
        use_entropy: true,
        ..MonteCloraConfig::preset(Preset::Peft)
    };
    let method = (methods::find(name)?.new)(&serde_json::to_value(config_of)?)?;
    let model = decoder.config();
    let mut state = AdapterState::initial(method, &config, &sites, model, 0, &device)?;
    state.attach(&decoder, true, 0)?;
    let (mut optimizer, adamw) = (AdamW::new(&state)?, TrainConfig::default());
    let rows = random_rows(&decoder, &vec![args.seq; args.batch]);
    let sequences = Sequences::new(&rows);
    let targets: Vec<(usize, u32)> = rows
        .iter()
        .enumerate()
        .flat_map(|(r, row)| (1..row.len()).map(move |i| (r * row.len() + i - 1, row[i])))
        .collect();
    let scale = 1.0 / targets.len() as f64;
    let options = PassOptions {
        dropout: None,
        checkpointing: args.gradient_checkpointing,
    };
    let weighting = state.weighting(1.0, targets.len() as u64);
    let load_s = began.elapsed().as_secs_f64();
    let mut seconds = Vec::with_capacity(args.steps);
    let mut watch = Stopwatch::new(&device);
    for step in 0..args.steps {
        let began = watch.start();
        let drawn = state.draw(0, step as u64, &weighting)?;
        watch.lap(DRAW)?;
        let loss =
            decoder.loss_and_gradients(&sequences, &targets, &drawn.active, scale, options)?;
        watch.lap(PASSES)?;
        if let Some(gradients) = &loss.gradients {
            let gradients = drawn.backward(&state, gradients)?;
            optimizer.step(&adamw, &mut state, &gradients, 2e-4, 2e-4)?;
        }
        watch.lap(OPTIMIZER)?;
        seconds.push(began.elapsed().as_secs_f64());
        tracing::debug!(
            "step {step}: {:.3} s, loss {:.4}",
            seconds[step],
            loss.total() * scale
        );
    }
    let median = median_after_first(&seconds);
    let tokens_per_second = (args.batch * args.seq) as f64 / median;
    let peak_gb = peak_memory_bytes(&device).map(gb);
    let files = (!args.random_weights).then(|| ModelFiles::open(&base.dir));
    let estimate = estimate(args, &decoder, (weights, files.transpose()?), &state);
    let estimate_gb = gb(estimate.peak);
    if args.json {
        return print_json(&json!({
            "method": name,
            "batch": args.batch,
            "seq": args.seq,
            "step_s": seconds,
            "tokens_per_second": tokens_per_second,
            "peak_gb": peak_gb,
            "estimate_gb": estimate_gb,
            "load_s": load_s,
            "threads": rayon::current_num_threads(),
            "device": device_name(&device),
            "phases_s": {
                "draw": watch.seconds[DRAW],
                "forward_backward": watch.seconds[PASSES],
                "optimizer": watch.seconds[OPTIMIZER],
            },
            "device_memory_bytes": watch.device_memory,
        }));
    }
    let [draw, passes, optimizer] = watch.seconds.each_ref().map(|s| median_after_first(s));
    let on_device = watch.device_memory.map_or(String::new(), |bytes| {
        format!(", {:.2} GB in use on the device", bytes as f64 / 1e9)
    });
    print(&format!(
        "{name}, batch {} x {}: {median:.3} s per step (median), {tokens_per_second:.0} tokens/s, peak {} GB\n\
         draw {draw:.3} s, forward and backward {passes:.3} s, optimizer {optimizer:.3} s{on_device}",
        args.batch,
        args.seq,
        peak_gb.map_or("?".to_owned(), |gb| format!("{gb:.2}"))
    ))
}

/// Kibibytes divided by 1e6, as PEFT's script reports `ru_maxrss`.
fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1024.0 / 1e6
}

/// The model in `dir`, or one of its sizes with random weights.
fn decoder(dir: &Path, device: &Device, weights: &'static Kind, random: bool) -> Result<Decoder> {
    Ok(match random {
        true => Decoder::random(dir, device, weights, 0)?,
        false => Decoder::load_as(dir, device, weights)?,
    })
}

/// Random tokens, a row of each length.
fn random_rows(decoder: &Decoder, lengths: &[usize]) -> Vec<Vec<u32>> {
    let vocab = decoder.config().vocab_size as f64;
    let row = |(row, length): (usize, &usize)| {
        let uniforms = Key::new(0, "bench", row as u64).uniforms(Purpose::InitialA, *length);
        uniforms.into_iter().map(|u| (u * vocab) as u32).collect()
    };
    lengths.iter().enumerate().map(row).collect()
}

/// Measures greedy decoding after random prompts, without end tokens.
pub(super) fn generate(args: &BenchGenerateArgs) -> Result<()> {
    if [args.batch, args.prompt, args.runs].contains(&0) || args.tokens < 2 {
        bail!(Problem::usage(
            "bench generate needs --batch, --prompt and --runs of at least 1, and --tokens of at least 2",
        ));
    }
    at_most(
        "bench generate",
        &[args.batch, args.prompt, args.runs, args.tokens],
    )?;
    let base = hub::locate(args.model.id()?, &args.model.options.hub())?;
    let device = device(args.model.options.cpu)?;
    let weights = weight_type(args.model.options.dtype)?;
    let decoder = decoder(&base.dir, &device, weights, args.random_weights)?;
    let shortest = if args.ragged {
        args.prompt.div_ceil(2)
    } else {
        args.prompt
    };
    let span = args.prompt - shortest;
    let lengths: Vec<usize> = (0..args.batch)
        .map(|row| args.prompt - row * span / args.batch.max(2).saturating_sub(1))
        .collect();
    let prompts = random_rows(&decoder, &lengths);
    let settings = GenerationSettings {
        max_new_tokens: args.tokens,
        stop_tokens: Vec::new(),
        batch_size: args.batch,
    };
    let adapter = ActiveAdapter::default();
    let (mut prompt_s, mut decode_s) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..args.runs {
        let began = Instant::now();
        // The time before each token.
        let times = Mutex::new(Vec::with_capacity(args.tokens));
        let note = || {
            if let Ok(mut times) = times.lock() {
                times.push(began.elapsed().as_secs_f64());
            }
            true
        };
        decoder.generate_while(&prompts, &adapter, &settings, &note, |_| {})?;
        let all = began.elapsed().as_secs_f64();
        let times = times.into_inner().unwrap_or_default();
        let first = times.get(1).copied().unwrap_or(all);
        prompt_s = prompt_s.min(first);
        decode_s = decode_s.min(all - first);
    }
    let per_second = (args.batch * (args.tokens - 1)) as f64 / decode_s;
    let prompt_tokens: usize = lengths.iter().sum();
    let prompt_per_second = prompt_tokens as f64 / prompt_s;
    let threads = rayon::current_num_threads();
    if args.json {
        return print_json(&json!({
            "batch": args.batch,
            "prompt": args.prompt,
            "tokens": args.tokens,
            "prompt_tokens_per_second": prompt_per_second,
            "tokens_per_second": per_second,
            "peak_gb": peak_memory_bytes(&device).map(gb),
            "threads": threads,
        }));
    }
    print(&format!(
        "{} texts of {} tokens after {}: {per_second:.0} tokens/s, prompts {prompt_per_second:.0} tokens/s",
        args.batch, args.tokens, args.prompt
    ))
}

/// The phases of a step. The optimizer's includes the pull-back of the gradients to the method's parameters.
const DRAW: usize = 0;
const PASSES: usize = 1;
const OPTIMIZER: usize = 2;

/// Times the phases of every step.
struct Stopwatch<'a> {
    device: &'a Device,
    began: Instant,
    /// Seconds of each step, for each phase.
    seconds: [Vec<f64>; 3],
    /// The most bytes in use on the device at the end of a phase, those of other programs included. `None` if the device
    /// does not tell.
    device_memory: Option<u64>,
}

impl<'a> Stopwatch<'a> {
    fn new(device: &'a Device) -> Self {
        Self {
            device,
            began: Instant::now(),
            seconds: Default::default(),
            device_memory: None,
        }
    }

    fn start(&mut self) -> Instant {
        self.began = Instant::now();
        self.began
    }

    /// Ends a phase once the device has done its work, and starts the next one.
    fn lap(&mut self, phase: usize) -> Result<()> {
        // Before waiting, since an idle device's allocator may give memory back.
        self.device_memory = self.device_memory.max(device_memory(self.device)?);
        self.device.synchronize()?;
        self.seconds[phase].push(self.began.elapsed().as_secs_f64());
        self.start();
        Ok(())
    }
}

/// Bytes in use on a CUDA device.
fn device_memory(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let stream = device.cuda_stream();
            let (free, total) = stream.context().mem_get_info()?;
            Ok(Some((total - free) as u64))
        }
        _ => Ok(None),
    }
}

/// The memory estimate that `train --dry-run` would report for these batches.
fn estimate(
    args: &BenchTrainArgs,
    decoder: &Decoder,
    (kind, files): (&Kind, Option<ModelFiles>),
    state: &AdapterState,
) -> MemoryEstimate {
    let model = decoder.config();
    let weights = model
        .tensors()
        .into_iter()
        .map(|tensor| match tensor.shape[..] {
            [rows, columns] => {
                let stored = files.as_ref().and_then(|files| files.get(&tensor.name));
                let blocks = stored.as_ref().and_then(|stored| stored.blocks());
                (kind.bytes)(rows * columns, blocks)
            }
            ref shape => size_of::<f32>() * shape.iter().product::<usize>(),
        });
    let sites: Vec<_> = state.modules.iter().map(|(_, m)| m.clone()).collect();
    MemoryEstimate::of(&MemoryInputs {
        model,
        weights: weights.sum::<usize>() as u64,
        base_bytes: 0,
        sites: &sites,
        method: state.method.as_ref(),
        lengths: &vec![args.seq; args.batch],
        trained_share: 1.0,
        batches: BatchOptions {
            batch_size: args.batch,
            pack_tokens: None,
            shuffle_seed: None,
        },
        dropout: false,
        gradient_checkpointing: args.gradient_checkpointing,
        program: PROGRAM,
        on_cpu: decoder.device().is_cpu(),
    })
}

/// Measures the speed of `size` by `size` matrix products on the CPU, computed as in the decoder.
pub(super) fn matmul(args: &BenchMatmulArgs) -> Result<()> {
    if args.size == 0 || args.steps < 2 {
        bail!(Problem::usage(
            "bench matmul needs --size >= 1 and --steps >= 2"
        ));
    }
    // Three matrices of 4 GB.
    if args.size > 1 << 15 {
        bail!(Problem::usage("bench matmul needs --size <= 32768"));
    }
    at_most("bench matmul", &[args.steps])?;
    let shape = (args.size, args.size);
    let factor = Tensor::full(0.5f32, shape, &Device::Cpu)?;
    let (weight, precision): (Box<dyn Weight>, _) = match args.bf16 {
        true => (Box::new(Bf16::new(&factor)?), Precision::Bf16),
        false => (Box::new(factor.clone()), Precision::Single),
    };
    let product = Product::new(Factor::Plain(&factor), Factor::Plain(weight.as_ref()));
    let product = product.with_precision(precision);
    let mut seconds = Vec::with_capacity(args.steps);
    for _ in 0..args.steps {
        let began = Instant::now();
        sum_of_products(None, &[product])?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    let median = median_after_first(&seconds);
    let gflop_per_s = 2.0 * (args.size as f64).powi(3) / median / 1e9;
    let threads = rayon::current_num_threads();
    let dtype = if args.bf16 { "bf16" } else { "f32" };
    if args.json {
        return print_json(&json!({
            "size": args.size,
            "dtype": dtype,
            "median_s": median,
            "gflop_per_s": gflop_per_s,
            "threads": threads,
        }));
    }
    print(&format!(
        "{0} x {0} x {0}, {dtype}, {threads} threads: {gflop_per_s:.0} GFLOP/s (median)",
        args.size
    ))
}

/// Refuses counts that no benchmark can take.
fn at_most(command: &str, counts: &[usize]) -> Result<()> {
    const MOST: usize = 1 << 20;
    if counts.iter().any(|count| *count > MOST) {
        bail!(Problem::usage(format!(
            "{command} needs numbers of at most {MOST}"
        )));
    }
    Ok(())
}

/// Median of all values but the first, which includes one-time setup.
fn median_after_first(seconds: &[f64]) -> f64 {
    let mut later = seconds[1..].to_vec();
    later.sort_by(f64::total_cmp);
    let middle = later.len() / 2;
    if later.len() % 2 == 1 {
        later[middle]
    } else {
        0.5 * (later[middle - 1] + later[middle])
    }
}
