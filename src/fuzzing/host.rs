//! Readers of what Podman, CRIU and the runtime say.

use std::fs;

use futures::StreamExt;

use super::scratch::Scratch;
use super::{choice, pieces};
use crate::criu::pages::Layout;
use crate::criu::pages::fetch::{self, FirstMoments};
use crate::criu::pages::wanted;
use crate::criu::pages::writer::PageWriter;
use crate::criu::{DumpStats, RestoreStats};
use crate::podman::fuzzing as podman_readers;
use crate::runtime::{Invocation, fuzzing as runtime_readers};

/// CRIU's statistics.
pub fn stats(input: &[u8]) {
    let (how, image) = choice(input);
    if how & 1 == 0 {
        let _ = DumpStats::parse(image);
    } else {
        let _ = RestoreStats::parse(image);
    }
}

/// CRIU's pages ([`PageWriter`]): only in the directory, and no pages but those that came.
pub fn pages(input: &[u8]) {
    let (how, stream) = choice(input);
    let layout = match how & 1 {
        0 => Layout::Wide,
        _ => Layout::Narrow,
    };
    let here = Scratch::new();
    let mut writer = PageWriter::new(here.path(), layout);
    let fed = pieces(stream, how >> 1).try_for_each(|piece| writer.feed(piece));
    let written = fed.and_then(|()| writer.finish());
    let mut bytes = 0;
    for entry in fs::read_dir(here.path()).expect("there") {
        let name = entry.expect("read").file_name().display().to_string();
        assert!(name.starts_with("page") && name.ends_with(".img"), "{name}");
        if name.starts_with("pages-") {
            let about = fs::metadata(here.path().join(&name)).expect("there");
            bytes += about.len();
        }
    }
    assert!(bytes <= stream.len() as u64);
    if let Ok(written) = written {
        assert_eq!(written, bytes);
    }
}

/// What is said of pages that are fetched after a restore: the requests of a destination at the source, or at
/// the destination what CRIU asks for and what the source answers.
pub fn fetch(input: &[u8]) {
    let (how, input) = choice(input);
    let layout = match how & 1 {
        0 => Layout::Wide,
        _ => Layout::Narrow,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let runtime = runtime.expect("a runtime with nothing but a clock");
    if how & 2 == 0 {
        let passed = runtime.block_on(wanted::requests(input, layout).collect::<Vec<_>>());
        let bytes: usize = passed.iter().flatten().map(|request| request.len()).sum();
        assert!(bytes <= input.len());
        return;
    }
    let (asked, answers) = part(input);
    let (mut asks, mut given) = (Vec::new(), Vec::new());
    let moments = FirstMoments::default();
    let fetched = fetch::fetch((asked, &mut given), &mut asks, answers, layout, &moments);
    let fetched = runtime.block_on(fetched);
    assert!(
        answers.starts_with(&given),
        "what is given is what has come"
    );
    let passed = runtime.block_on(wanted::requests(&asks[..], layout).collect::<Vec<_>>());
    if fetched.is_ok() {
        assert!(
            passed.iter().all(Result::is_ok),
            "the source would refuse it"
        );
    }
}

/// A part of an input, with its length in front of it, and the rest.
fn part(input: &[u8]) -> (&[u8], &[u8]) {
    match input.split_first_chunk() {
        Some((length, rest)) => rest.split_at(rest.len().min(u16::from_le_bytes(*length).into())),
        None => (input, &[]),
    }
}

/// Podman's answers, and what follows from them.
pub fn podman(input: &[u8]) {
    let (which, json) = choice(input);
    podman_readers::read(which, json);
}

/// How Podman calls its runtime, and what livemig and its wrapper say to each other.
pub fn runtime(input: &[u8]) {
    let (how, text) = choice(input);
    if how & 1 == 0 {
        return runtime_readers::read_message(how >> 1, text);
    }
    let arguments: Vec<String> = text
        .split(|byte| *byte == b'\n')
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    let Some(call) = Invocation::read(&arguments) else {
        return;
    };
    assert_eq!(call.arguments(), arguments);
    let _ = (call.pid_file(), call.option("--bundle"));
    let changed = call
        .clone()
        .with_image_path("/images".as_ref())
        .with_work_path("/work".as_ref())
        .with_flag("--leave-running");
    assert_eq!(changed.option("--work-path"), Some("/work"));
    // What is changed can be read again, as the same call of the same container.
    let again = Invocation::read(changed.arguments()).expect("a call");
    assert_eq!((again.verb, &again.container), (call.verb, &call.container));
    assert_eq!(again.image_path(), Some("/images".as_ref()));
}
