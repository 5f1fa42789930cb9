//! Every `unsafe` in the library and the command, with what it is for.
//!
//! That each has a comment which proves it is clippy's to say (`undocumented_unsafe_blocks`). This says
//! how many there are: one that is added, or gone, has to be added here, or taken away.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A file, how often it says `unsafe`, and why it cannot do without.
const LISTED: &[(&str, usize, &str)] = &[
    (
        "criu/freezer.rs",
        1,
        "tokio asks for the promise that a descriptor it waits on stays open: it owns it",
    ),
    (
        "netlink/channel.rs",
        2,
        "neli's socket gives away the number of its descriptor only, which has to be borrowed for rustix \
         and registered with tokio",
    ),
    (
        "runtime/held_criu.rs",
        1,
        "a descriptor that the runtime leaves open for CRIU, and says the number of",
    ),
    (
        "tunnel/device/tun.rs",
        3,
        "two ioctl(2) that make a tun, for which there is no other call, and tokio's promise again",
    ),
    (
        "tunnel/marker.rs",
        3,
        "the address of a packet socket and a filter for it, which nix takes by their bytes only or not at \
         all, and tokio's promise again",
    ),
    // Tests.
    (
        "agent/session_tests.rs",
        1,
        "a thread of its own in a network namespace of its own",
    ),
    (
        "bundle/changes_tests.rs",
        3,
        "writes to a file by way of memory, which no safe call does",
    ),
    (
        "bundle/test_trees.rs",
        1,
        "a thread of its own with mounts of its own",
    ),
    (
        "tunnel/tests.rs",
        5,
        "a network namespace of its own, and two socket options that rustix has not",
    ),
];

/// How often a file says `unsafe`, comments left out.
fn count(text: &str) -> usize {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .flat_map(|code| code.split(|c: char| !(c.is_alphanumeric() || c == '_')))
        .filter(|word| *word == "unsafe")
        .count()
}

fn look(directory: &Path, root: &Path, found: &mut BTreeMap<String, usize>) {
    for entry in fs::read_dir(directory).expect("a source file") {
        let path = entry.expect("a source file").path();
        if path.is_dir() {
            look(&path, root, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let times = count(&fs::read_to_string(&path).expect("a source file"));
            if times > 0 {
                let name = path
                    .strip_prefix(root)
                    .expect("a source file")
                    .display()
                    .to_string();
                found.insert(name, times);
            }
        }
    }
}

#[test]
fn every_unsafe_is_listed_with_what_it_is_for() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    look(&root, &root, &mut found);
    let listed: BTreeMap<String, usize> = LISTED
        .iter()
        .map(|(file, times, _)| ((*file).to_owned(), *times))
        .collect();
    assert_eq!(found, listed, "found, and listed in {}", file!());
    for (file, times, why) in LISTED {
        println!("{times} in {file}: {why}");
    }
    println!("{} in all", found.values().sum::<usize>());
}
