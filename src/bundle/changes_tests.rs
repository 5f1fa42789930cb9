//! Every case changes real trees in rounds, brings each round into others, and compares completely.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;

use super::super::apply::{Applied, Applier, Limits, apply, persist};
use super::super::test_trees::*;
use super::*;

const LIMITS: Limits = Limits {
    entries: 1_000_000,
    bytes: 1 << 40,
    devices: true,
};

/// A container's trees at both ends.
struct Pair {
    base: PathBuf,
    from: Overlay,
    to: Overlay,
}

impl Pair {
    fn new(base: &Path, name: &str, options: &str) -> Pair {
        let base = base.to_owned();
        let from = Overlay::mount(&base, &format!("from-{name}"), options);
        let to = Overlay::mount(&base, &format!("to-{name}"), OPTIONS[0]);
        let pair = Pair { base, from, to };
        for end in ["here", "there"] {
            for tree in [TreeId::Shm, TreeId::Volume("data".into())] {
                let at = pair.at(&tree, end);
                let _ = fs::remove_dir_all(&at);
                fs::create_dir_all(at).expect("made");
            }
        }
        pair
    }

    fn at(&self, tree: &TreeId, end: &str) -> PathBuf {
        match tree {
            TreeId::Rootfs if end == "here" => self.from.layers.merged.clone(),
            TreeId::Rootfs => self.to.layers.merged.clone(),
            TreeId::Shm => self.base.join(format!("{end}-shm")),
            TreeId::Volume(name) => self.base.join(format!("{end}-volume-{name}")),
        }
    }

    fn mirror(&self) -> Mirror {
        let volume = TreeId::Volume("data".into());
        Mirror::new(vec![
            Source::rootfs(self.from.layers.clone()),
            Source::shm(self.at(&TreeId::Shm, "here")),
            Source::volume("data", self.at(&volume, "here")),
        ])
    }

    /// Sends a round, and looks at what came of it.
    fn round(&self, mirror: Mirror, told: &str) -> (Mirror, Summary, Applied) {
        let mut archive = Vec::new();
        let round = mirror.write(Pace::Frozen, &mut archive).expect("written");
        let applied = self.bring_in(&archive, told);
        // A second time changes nothing.
        self.bring_in(&archive, told);
        (round.mirror, round.summary, applied)
    }

    fn bring_in(&self, archive: &[u8], told: &str) -> Applied {
        let mut applier = Applier::new(|tree: &TreeId| Some(self.at(tree, "there")), LIMITS);
        for piece in archive.chunks(1000) {
            applier
                .feed(piece)
                .unwrap_or_else(|e| panic!("{told}: {}", whole(&e)));
        }
        let applied = applier
            .finish()
            .unwrap_or_else(|e| panic!("{told}: {}", whole(&e)));
        for tree in [TreeId::Rootfs, TreeId::Shm, TreeId::Volume("data".into())] {
            let (here, there) = (self.at(&tree, "here"), self.at(&tree, "there"));
            assert_same(&here, &there, Carried::Exactly, &format!("{told}, {tree}"));
        }
        applied
    }
}

fn whole(error: &Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Makes a state, sends it, changes it, sends that, and compares each time: in memory and on a disk,
/// with all kinds of overlay. Says how many entries and removals the second round had, with the
/// kernel's own options.
fn case(before: fn(&Path), after: fn(&Path)) -> Vec<(u64, u64)> {
    let (send, got) = std::sync::mpsc::channel();
    let test = move |base: &Path| {
        make_lower(base);
        let pairs = OPTIONS.map(|options| {
            let pair = Pair::new(base, &options.replace([',', '='], "-"), options);
            before(&pair.at(&TreeId::Rootfs, "here"));
            (pair, options)
        });
        settle();
        let rounds = pairs.map(|(pair, options)| {
            let (mirror, ..) = pair.round(pair.mirror(), options);
            after(&pair.at(&TreeId::Rootfs, "here"));
            (pair, options, mirror)
        });
        settle();
        for (pair, options, mirror) in rounds {
            let (mirror, summary, applied) = pair.round(mirror, &format!("{options}, changed"));
            assert_eq!(summary.skipped, []);
            if options == OPTIONS[0] {
                send.send((applied.entries, applied.removals))
                    .expect("sent");
            }
            let (_, _, applied) = pair.round(mirror, &format!("{options}, as it was"));
            assert_eq!(applied, Applied::default(), "nothing has changed since");
        }
    };
    in_namespace(test.clone());
    in_namespace_on_disk(test);
    got.iter().collect()
}

/// Lets so much time pass that a change can be told from one before.
fn settle() {
    // What is waited for is the kernel's clock, not another thread.
    std::thread::sleep(std::time::Duration::from_millis(120));
}

fn write(root: &Path, path: &str, content: &str) {
    fs::write(root.join(path), content).expect("written");
}

fn mode(root: &Path, path: &str, mode: u32) {
    fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).expect("changed");
}

#[test]
fn only_what_changed_is_sent() {
    let counts = case(
        |root| {
            write(root, "etc/new", "new\n");
            fs::create_dir_all(root.join("a/b/c")).expect("made");
            write(root, "a/b/c/x", "x");
            write(root, "a/b/c/y", "y");
            fs::remove_file(root.join("home/user/notes")).expect("removed");
        },
        |root| {
            write(root, "etc/new", "newer");
            write(root, "etc/passwd", "changed\n");
            fs::remove_file(root.join("a/b/c/x")).expect("removed");
            fs::remove_file(root.join("var/log/log")).expect("removed");
        },
    );
    // etc, etc/new, etc/passwd, a/b/c, var, var/log (var came to the upper layer by that, and the
    // root directory with it); two removals.
    for (entries, removals) in counts {
        assert!(entries <= 7, "{entries}");
        assert_eq!(removals, 2);
    }
}

#[test]
fn what_was_sent_and_is_gone_again() {
    case(
        |root| {
            fs::create_dir_all(root.join("tmp/deep/er")).expect("made");
            write(root, "tmp/deep/er/x", "x");
            write(root, "tmp/deep/y", "y");
            write(root, "z", "z");
            symlink("x", root.join("tmp/link")).expect("linked");
        },
        |root| {
            fs::remove_dir_all(root.join("tmp/deep")).expect("removed");
            fs::remove_file(root.join("z")).expect("removed");
            fs::remove_file(root.join("tmp/link")).expect("removed");
        },
    );
}

#[test]
fn renames_without_a_change() {
    case(
        |root| {
            fs::create_dir_all(root.join("one/in")).expect("made");
            fs::create_dir_all(root.join("two/in")).expect("made");
            write(root, "one/in/x", "one");
            write(root, "two/in/x", "two");
            write(root, "one/a", "1");
            write(root, "one/b", "2");
        },
        |root| {
            let rename = |from, to| fs::rename(root.join(from), root.join(to)).expect("renamed");
            // Exchanges: the names stay.
            rename("one/in", "three");
            rename("two/in", "one/in");
            rename("three", "two/in");
            rename("one/a", "c");
            rename("one/b", "one/a");
            rename("c", "one/b");
            // Of the image.
            rename("etc/passwd", "etc/passwd-");
            rename("etc/conf.d/a", "etc/conf.d/c");
        },
    );
}

#[test]
fn one_kind_becomes_another() {
    case(
        |root| {
            for name in ["d-f", "d-l", "usr/d-d"] {
                fs::create_dir_all(root.join(name).join("sub")).expect("made");
                write(root, &format!("{name}/sub/x"), "x");
            }
            for name in ["f-d", "f-l", "f-p"] {
                write(root, name, "f");
            }
            symlink("etc", root.join("l-d")).expect("linked");
            symlink("etc/passwd", root.join("l-f")).expect("linked");
        },
        |root| {
            for name in ["d-f", "d-l", "usr/d-d", "var/log"] {
                fs::remove_dir_all(root.join(name)).expect("removed");
            }
            for name in ["f-d", "f-l", "f-p", "l-d", "l-f", "bin"] {
                fs::remove_file(root.join(name)).expect("removed");
            }
            write(root, "d-f", "now a file");
            symlink("usr", root.join("d-l")).expect("linked");
            for name in ["f-d", "l-d", "usr/d-d", "bin", "var/log"] {
                fs::create_dir(root.join(name)).expect("made");
                write(root, &format!("{name}/y"), "y");
            }
            symlink("etc", root.join("f-l")).expect("linked");
            write(root, "l-f", "now a file");
            make_node(&root.join("f-p"), rustix::fs::FileType::Fifo, 0, 0);
        },
    );
}

#[test]
fn directories_of_the_image_that_come_and_go() {
    case(
        |root| {
            fs::remove_dir_all(root.join("usr/share")).expect("removed");
            fs::remove_dir_all(root.join("home")).expect("removed");
            fs::create_dir(root.join("home")).expect("made");
            write(root, "home/mine", "mine");
            write(root, "etc/conf.d/a", "changed");
        },
        |root| {
            // Removed before, made now.
            fs::create_dir_all(root.join("usr/share/doc")).expect("made");
            write(root, "usr/share/doc/new", "new");
            // Fresh before, and fresh again, another one.
            fs::remove_dir_all(root.join("home")).expect("removed");
            fs::create_dir(root.join("home")).expect("made");
            write(root, "home/yours", "yours");
            // Merged before, fresh now.
            fs::remove_dir_all(root.join("etc/conf.d")).expect("removed");
            fs::create_dir(root.join("etc/conf.d")).expect("made");
            write(root, "etc/conf.d/b", "another b");
        },
    );
}

#[test]
fn directories_of_the_image_that_are_renamed() {
    case(
        |root| {
            // Where the overlay cannot, programs copy.
            let _ = fs::rename(root.join("usr/share"), root.join("share"));
            let _ = fs::rename(root.join("opt/app"), root.join("app"));
        },
        |root| {
            let _ = fs::rename(root.join("share"), root.join("shared"));
            let _ = fs::rename(root.join("app"), root.join("opt/app"));
            let _ = fs::rename(root.join("home"), root.join("houses"));
            if root.join("shared").exists() {
                write(root, "shared/doc/pkg/readme", "changed");
                fs::remove_dir_all(root.join("houses/user")).expect("removed");
                fs::create_dir(root.join("houses/user")).expect("made");
            }
        },
    );
}

#[test]
fn links_between_what_changed_and_what_did_not() {
    case(
        |root| {
            write(root, "a", "one file");
            fs::create_dir(root.join("d")).expect("made");
            fs::hard_link(root.join("a"), root.join("d/b")).expect("linked");
            write(root, "single", "single");
            write(root, "parted", "parted");
            fs::hard_link(root.join("parted"), root.join("parted-too")).expect("linked");
            fs::create_dir(root.join("moved")).expect("made");
            write(root, "moved/inner", "linked from elsewhere");
            fs::hard_link(root.join("moved/inner"), root.join("outer")).expect("linked");
        },
        |root| {
            // One more name; a name that becomes a file of its own; a file that changes by one name.
            fs::hard_link(root.join("single"), root.join("d/single-too")).expect("linked");
            fs::remove_file(root.join("parted-too")).expect("removed");
            write(root, "parted-too", "parted");
            write(root, "a", "changed by one name");
            // The names' own stamps are as before.
            fs::rename(root.join("moved"), root.join("there")).expect("renamed");
            // Of the image.
            write(root, "linked", "changed by one name");
        },
    );
}

#[test]
fn owners_modes_attributes_and_times() {
    case(
        |root| {
            write(root, "file", "file");
            set_attribute(&root.join("file"), "user.one", b"1");
            set_attribute(&root.join("file"), "user.gone", b"2");
            fs::create_dir(root.join("dir")).expect("made");
            set_attribute(&root.join("dir"), "user.gone", b"2");
            write(root, "dir/in", "in");
            symlink("nowhere", root.join("link")).expect("linked");
            lchown(root, Some(3), Some(4)).expect("changed");
        },
        |root| {
            let removed = |path: &str, name: &str| {
                rustix::fs::removexattr(root.join(path), name).expect("removed");
            };
            removed("file", "user.gone");
            removed("dir", "user.gone");
            set_attribute(&root.join("file"), "user.one", b"\n=\0");
            set_attribute(&root.join("link"), "trusted.note", b"on a symbolic link");
            let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
            lchown(root.join("usr/bin/tool"), Some(70_000), Some(5)).expect("changed");
            mode(root, "usr/bin/tool", 0o6755);
            set_attribute(
                &root.join("usr/bin/tool"),
                "security.capability",
                capability,
            );
            lchown(root.join("link"), Some(5), Some(6)).expect("changed");
            mode(root, "dir", 0o1700);
            mode(root, "etc", 0o700);
            set_modified(&root.join("dir"), 1_234_567_890, 123_456_789);
            set_modified(&root.join("link"), -5, 250_000_000);
            set_modified(root, 77, 0);
            set_attribute(root, "user.root", b"yes");
        },
    );
}

#[test]
fn the_same_size_and_the_same_times_do_not_hide_a_change() {
    case(
        |root| {
            write(root, "etc/secret", "old!");
            set_modified(&root.join("etc/secret"), 1_000_000, 0);
        },
        |root| {
            write(root, "etc/secret", "new!");
            set_modified(&root.join("etc/secret"), 1_000_000, 0);
        },
    );
}

#[test]
fn holes_stay_holes() {
    let sparse = |root: &Path| {
        let file = File::create(root.join("sparse")).expect("made");
        file.set_len(64 << 20).expect("grown");
        for at in [0, 20 << 20, (64 << 20) - 5] {
            std::os::unix::fs::FileExt::write_at(&file, b"piece", at).expect("written");
        }
        let file = File::create(root.join("hole")).expect("made");
        file.set_len(1 << 40)
            .map_or_else(|_| file.set_len(1 << 30), Ok)
            .expect("grown");
    };
    in_namespace_on_disk(move |base| {
        make_lower(base);
        let pair = Pair::new(base, "sparse", OPTIONS[0]);
        sparse(&pair.at(&TreeId::Rootfs, "here"));
        let mut archive = Vec::new();
        let round = pair
            .mirror()
            .write(Pace::Frozen, &mut archive)
            .expect("written");
        assert!(archive.len() < 200_000, "{}", archive.len());
        assert!(round.summary.holes > 1 << 30);
        let there = pair.at(&TreeId::Rootfs, "there");
        let mut applier = Applier::new(|tree: &TreeId| Some(pair.at(tree, "there")), LIMITS);
        for piece in archive.chunks(513) {
            applier.feed(piece).expect("applied");
        }
        applier.finish().expect("applied");
        for name in ["sparse", "hole"] {
            let (from, to) = (
                fs::metadata(pair.at(&TreeId::Rootfs, "here").join(name)).expect("there"),
                fs::metadata(there.join(name)).expect("there"),
            );
            assert_eq!(from.len(), to.len());
            assert!(to.blocks() * 512 < 200_000, "{name}: {}", to.blocks());
        }
        let read =
            |end: &str| fs::read(pair.at(&TreeId::Rootfs, end).join("sparse")).expect("read");
        assert!(read("here") == read("there"));
    });
}

/// A page that is mapped and has been written to can be written to again without a trace in the
/// file's times, on a disk until it is written back, in memory always.
#[test]
fn changes_through_a_mapping_are_seen() {
    let test = |base: &Path| {
        make_lower(base);
        let pair = Pair::new(base, "mapped", OPTIONS[0]);
        let root = pair.at(&TreeId::Rootfs, "here");
        write(&root, "mapped", &"0".repeat(10_000));
        write(
            &pair.at(&TreeId::Shm, "here"),
            "mapped",
            &"0".repeat(10_000),
        );
        let shell_maps = [
            root.join("mapped"),
            pair.at(&TreeId::Shm, "here").join("mapped"),
        ];
        let mut maps: Vec<Mapped> = shell_maps.iter().map(|path| Mapped::of(path)).collect();
        for map in &mut maps {
            map.write(5000, b'1');
        }
        settle();
        let mut archive = Vec::new();
        let round = pair
            .mirror()
            .write(Pace::Running, &mut archive)
            .expect("written");
        pair.bring_in(&archive, "mapped");
        for map in &mut maps {
            map.write(5000, b'2');
        }
        settle();
        pair.round(round.mirror, "written to again");
    };
    in_namespace(test);
    in_namespace_on_disk(test);
}

/// A page of a file, mapped so that others see what is written to it.
struct Mapped(*mut u8);

const MAPPED: usize = 8192;

unsafe extern "C" {
    // mmap(2) of the C library. Nothing else needs it, so no crate is asked.
    fn mmap(at: *mut u8, length: usize, protection: i32, flags: i32, fd: i32, from: i64)
    -> *mut u8;
}

impl Mapped {
    fn of(path: &Path) -> Mapped {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .expect("opened");
        let (read_and_write, shared) = (3, 1);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: a new mapping, where the kernel likes it; it stays until the process ends.
        let at = unsafe { mmap(std::ptr::null_mut(), MAPPED, read_and_write, shared, fd, 0) };
        assert!(at as isize != -1, "mapped");
        Mapped(at)
    }

    fn write(&mut self, at: usize, byte: u8) {
        assert!(at < MAPPED);
        // SAFETY: within the mapping, which nobody else in this process knows.
        unsafe { self.0.add(at).write_volatile(byte) };
    }
}

/// Podman does that when it mounts a volume for the first time, after rounds that have filled it.
#[test]
fn a_volume_is_mounted_after_it_was_filled() {
    for filled in [true, false] {
        in_namespace(move |base: &Path| {
            make_lower(base);
            let pair = Pair::new(base, "pair", OPTIONS[0]);
            let data = TreeId::Volume("data".into());
            let (here, there) = (pair.at(&data, "here"), pair.at(&data, "there"));
            if filled {
                write(&here, "file", "content");
            }
            std::os::unix::fs::chown(&here, Some(101), Some(102)).expect("root may");
            settle();
            let only_volume = Mirror::new(vec![Source::volume("data", here.clone())]);
            let mut archive = Vec::new();
            let round = only_volume.write(Pace::Frozen, &mut archive);
            let mirror = round.expect("written").mirror;
            let mut applier = Applier::new(|_: &TreeId| Some(there.clone()), LIMITS);
            applier.feed(&archive).expect("read");
            applier.finish().expect("brought in");
            assert_same(&here, &there, Carried::Exactly, "before");

            std::os::unix::fs::chown(&there, Some(0), Some(0)).expect("root may");
            if !filled {
                write(&there, "from-the-image", "which the container has removed");
            }
            let others = vec![
                Source::rootfs(pair.from.layers.clone()),
                Source::shm(pair.at(&TreeId::Shm, "here")),
            ];
            let (mirror, ..) = pair.round(mirror.volumes_mounted().and(others), "mounted");
            let (_, _, applied) = pair.round(mirror, "as it was");
            assert_eq!(applied, Applied::default(), "nothing has changed since");
        });
    }
}

#[test]
fn two_hundred_random_operations_in_rounds() {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).expect("random bytes");
    let seed = std::env::var("LIVEMIG_TEST_SEED").map_or(u64::from_ne_bytes(seed), |seed| {
        seed.parse().expect("a number")
    });
    println!("LIVEMIG_TEST_SEED={seed}");
    let test = move |base: &Path| {
        make_lower(base);
        for round in 0..6_u64 {
            let options = OPTIONS[round as usize % OPTIONS.len()];
            let mut random = Random(seed.wrapping_add(round).max(1));
            let pair = Pair::new(base, &round.to_string(), options);
            let mut mirror = pair.mirror();
            for step in 0..8 {
                for tree in [
                    TreeId::Rootfs,
                    TreeId::Rootfs,
                    TreeId::Shm,
                    TreeId::Volume("data".into()),
                ] {
                    for _ in 0..random.below(20) {
                        operate(&pair.at(&tree, "here"), &mut random);
                    }
                }
                let told =
                    format!("LIVEMIG_TEST_SEED={seed}, {options}, round {round}, step {step}");
                (mirror, ..) = pair.round(mirror, &told);
            }
        }
    };
    in_namespace(test);
    in_namespace_on_disk(test);
}

#[tokio::test]
async fn a_round_as_a_file_and_as_a_stream() {
    let base = tempfile::tempdir().expect("a directory");
    let (here, there) = (base.path().join("here"), base.path().join("there"));
    for end in [&here, &there] {
        fs::create_dir(end).expect("made");
    }
    fs::write(here.join("file"), vec![7; 3 << 20]).expect("written");
    fs::write(there.join("old"), "to be removed").expect("written");
    let mirror = Mirror::new(vec![Source::volume("data", here.clone())]);
    let (stream, round) = mirror.stream(Pace::Running);
    let target = there.clone();
    let targets =
        move |tree: &TreeId| (*tree == TreeId::Volume("data".into())).then(|| target.clone());
    let applied = apply(stream, targets.clone(), Limits::default())
        .await
        .expect("applied");
    assert_eq!((applied.entries, applied.bytes), (2, 3 << 20));
    let mirror = round.await.expect("written").mirror;
    assert_same(&here, &there, Carried::Exactly, "by a stream");

    fs::write(here.join("file"), "changed").expect("written");
    let (changes, _) = mirror
        .file(Pace::Frozen, base.path().into())
        .await
        .expect("written");
    assert!(changes.length < 10_000);
    apply(changes.into_stream(), targets, Limits::default())
        .await
        .expect("applied");
    assert_same(&here, &there, Carried::Exactly, "by a file");
    persist(vec![there.clone(), there.clone()])
        .await
        .expect("written out");
    persist(vec![base.path().join("not-there")])
        .await
        .expect_err("nothing to write out");
    assert_eq!(
        fs::read_dir(base.path()).expect("listed").count(),
        2,
        "nothing is left behind"
    );
}

#[test]
fn ten_thousand_files_that_did_not_change() {
    in_namespace_on_disk(|base| {
        make_lower(base);
        let pair = Pair::new(base, "many", OPTIONS[0]);
        let root = pair.at(&TreeId::Rootfs, "here");
        for directory in 0..100 {
            fs::create_dir(root.join(format!("d{directory}"))).expect("made");
            for file in 0..100 {
                write(&root, &format!("d{directory}/f{file}"), "content");
            }
        }
        settle();
        let round = pair
            .mirror()
            .write(Pace::Running, std::io::sink())
            .expect("written");
        write(&root, "d50/f50", "changed");
        let began = std::time::Instant::now();
        let round = round
            .mirror
            .write(Pace::Frozen, std::io::sink())
            .expect("written");
        println!("10,000 files, one of them changed: {:?}", began.elapsed());
        assert_eq!(round.summary.files, 1);
    });
}
