//! Each reader is given the corpus, and inputs made from it.
//!
//! Which inputs follows from a number that is printed; `LIVEMIG_FUZZ_SEED` sets another one, and
//! `LIVEMIG_FUZZ_INPUTS` how many there are. An input that a reader does not survive is written to
//! `target/fuzzing`, from where it belongs into the corpus.

use std::path::{Path, PathBuf};

use super::{TARGETS, seeds};

/// The number of this run.
fn seed() -> u64 {
    number("LIVEMIG_FUZZ_SEED").unwrap_or(0x6c6d)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number in the environment"))
}

/// Numbers that follow from a first one (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// One below a bound that is not zero.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// Numbers at the edges of types.
const EDGES: [&str; 8] = [
    "0",
    "1",
    "255",
    "65535",
    "65536",
    "4294967295",
    "18446744073709551615",
    "-1",
];

/// Another input.
fn changed(corpus: &[Vec<u8>], numbers: &mut Numbers) -> Vec<u8> {
    /// No input is longer.
    const LONGEST: usize = 64 << 10;
    let mut input = numbers.one_of(corpus).clone();
    for _ in 0..=numbers.below(4) {
        if input.is_empty() {
            input.push(0);
        }
        let at = numbers.below(input.len());
        let until = (at + 1 + numbers.below(64)).min(input.len());
        match numbers.below(9) {
            0 => input[at] ^= 1 << numbers.below(8),
            1 => input[at] = *numbers.one_of(&[0, 1, b' ', b'0', b'/', 0x7f, 0x80, 0xff]),
            2 => input.truncate(at),
            3 => drop(input.drain(at..until)),
            4 => {
                let again = input[at..until].to_vec();
                input.splice(at..at, again);
            }
            5 => {
                let other = numbers.one_of(corpus);
                let from = numbers.below(other.len().max(1)).min(other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            6 => {
                let edge = numbers.one_of(&[0, 1, 0x7fff_ffff, 0x8000_0000, u64::MAX]);
                let edge = edge
                    .rotate_right(8 * (numbers.next() % 8) as u32)
                    .to_be_bytes();
                let length = (*numbers.one_of(&[1, 2, 4, 8])).min(input.len() - at);
                input[at..at + length].copy_from_slice(&edge[..length]);
            }
            // A number as text.
            _ => {
                let digit = input[at..].iter().position(u8::is_ascii_digit);
                if let Some(digit) = digit.map(|digit| at + digit) {
                    let digits = input[digit..].iter();
                    let length = digits.take_while(|byte| byte.is_ascii_digit()).count();
                    let edge = numbers.one_of(&EDGES).bytes();
                    input.splice(digit..digit + length, edge);
                }
            }
        }
        input.truncate(LONGEST);
    }
    input
}

/// An input while it is read: if that panics, it is kept.
struct Kept<'a>(&'a str, &'a [u8]);

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzzing");
            let path = directory.join(self.0);
            let _ = std::fs::create_dir_all(&directory);
            match std::fs::write(&path, self.1) {
                Ok(()) => eprintln!("the input is in {}", path.display()),
                Err(error) => eprintln!("the input cannot be kept ({error}): {:?}", self.1),
            }
        }
    }
}

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

/// Gives a reader its corpus, and so many inputs made from it.
fn run(name: &str, inputs: u64) {
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.expect("a target of that name");
    let read = |input: &[u8]| {
        let _kept = Kept(name, input);
        (target.read)(input);
    };
    let directory = corpus(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| {
            panic!(
                "the corpus, which is kept in the repository and no part of the package, is not at \
                 {}: {error}",
                directory.display()
            )
        })
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut corpus = vec![Vec::new()];
    corpus.extend(
        files
            .iter()
            .map(|path| std::fs::read(path).expect("a file")),
    );
    for input in &corpus {
        read(input);
    }
    let inputs = number("LIVEMIG_FUZZ_INPUTS").unwrap_or(inputs);
    println!(
        "{name}: {} files and {inputs} inputs from LIVEMIG_FUZZ_SEED={}",
        files.len(),
        seed()
    );
    let mut numbers = Numbers(seed());
    for _ in 0..inputs {
        read(&changed(&corpus, &mut numbers));
    }
}

macro_rules! short_runs {
    ($($name:ident: $inputs:literal),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name), $inputs);
            }
        )*

        #[test]
        fn every_target_has_its_run_and_its_seeds() {
            let runs = [$(stringify!($name)),*];
            let targets: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(targets, runs);
            for target in TARGETS {
                for (name, input) in seeds::of(target.name) {
                    let path = corpus(target.name).join(&name);
                    assert!(path.exists(), "{}: make fuzz-corpus", path.display());
                    (target.read)(&input);
                }
            }
        }
    };
}

short_runs! {
    conntrack: 50_000,
    documents: 2_000,
    fetch: 5_000,
    files: 4_000,
    header: 5_000,
    images: 2_000,
    netlink: 50_000,
    packets: 20_000,
    pages: 5_000,
    podman: 20_000,
    protocol: 20_000,
    queue: 20_000,
    runtime: 10_000,
    sockets: 50_000,
    stats: 50_000,
    token: 10_000,
    transfer: 5_000,
    vetted: 20_000,
    walker: 20_000,
}

/// Whether what a seed is meant to be is still what its reader takes it for.
#[test]
fn the_seeds_are_read_to_their_end() {
    use crate::agent::protocol::{Offer, Prepare};
    let seed = |target: &str, name: &str| -> Vec<u8> {
        let seeds = seeds::of(target);
        let found = seeds.into_iter().find(|(found, _)| found == name);
        found.expect("a seed").1[1..].to_vec()
    };
    serde_json::from_slice::<Offer>(&seed("protocol", "offer")).unwrap();
    serde_json::from_slice::<Prepare>(&seed("protocol", "prepare")).unwrap();
    crate::criu::DumpStats::parse(&seed("stats", "dump")).unwrap();
    crate::criu::RestoreStats::parse(&seed("stats", "restore")).unwrap();
    let token = String::from_utf8(seed("token", "token")).unwrap();
    token.parse::<crate::agent::Token>().unwrap();
}

#[test]
#[ignore = "writes the seeds into the corpus: make fuzz-corpus"]
fn writes_the_corpus() {
    for target in TARGETS {
        let directory = corpus(target.name);
        std::fs::create_dir_all(&directory).unwrap();
        for (name, input) in seeds::of(target.name) {
            std::fs::write(directory.join(name), input).unwrap();
        }
    }
}
