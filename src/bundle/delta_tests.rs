//! Every case changes a real overlay, carries the changes over to a second one with the same lower
//! layers the way Podman's import does it, and compares the two merged trees completely.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};

use rustix::fs::{AtFlags, CWD, FileType, XattrFlags};

use super::super::archive::Extent;
use super::super::content::{MAX_EXTENTS, fill_small_holes};
use super::super::entries::clamped;
use super::super::test_trees::*;
use super::super::walker::records as pax_records;
use super::*;

// The test's own import, after containers/storage's `Unpack` and Podman's `crutils`.

fn import(root: &Path, archive: &[u8], deleted: &[String]) {
    let mut rest = archive;
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut directories = Vec::new();
    while rest.len() >= 512 && rest[..512] != [0; 512] {
        let header = tar::Header::from_byte_slice(&rest[..512]);
        let sum = header.cksum().expect("a sum");
        let counted: u32 = rest[..512]
            .iter()
            .enumerate()
            .map(|(at, b)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*b)
                }
            })
            .sum();
        assert_eq!(sum, counted, "a header's sum");
        let find = |key: &[u8]| {
            records
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.clone())
        };
        let decimal = |key: &[u8]| {
            find(key).map(|v| {
                String::from_utf8(v)
                    .expect("text")
                    .parse::<u64>()
                    .expect("a number")
            })
        };
        let size = decimal(b"size").unwrap_or_else(|| header.entry_size().expect("a size"));
        let size = size as usize;
        let mut content = rest[512..512 + size].to_vec();
        rest = &rest[512 + size.next_multiple_of(512)..];
        if header.as_bytes()[156] == b'x' {
            assert!(content.len() <= 1 << 20, "Go refuses longer ones");
            let read = pax_records(&content).expect("records");
            records = read
                .into_iter()
                .map(|(k, v)| (k.to_vec(), v.to_vec()))
                .collect();
            continue;
        }
        let mut name = find(b"path").unwrap_or_else(|| header.path_bytes().into_owned());
        if let Some(sparse) = find(b"GNU.sparse.name") {
            name = sparse;
            let full = decimal(b"GNU.sparse.realsize").expect("a size") as usize;
            content = expand(&content, full);
        }
        let link = find(b"linkpath")
            .or_else(|| header.link_name_bytes().map(|l| l.into_owned()))
            .unwrap_or_default();
        let at = |key: &[u8]| find(key).map(|v| pax_time(&v));
        let modified = at(b"mtime").unwrap_or((header.mtime().expect("a time") as i64, 0));
        let uid = decimal(b"uid").unwrap_or_else(|| header.uid().expect("an id")) as u32;
        let gid = decimal(b"gid").unwrap_or_else(|| header.gid().expect("an id")) as u32;
        let mode = header.mode().expect("a mode");
        let name = name.strip_suffix(b"/").unwrap_or(&name);
        let path = if name.is_empty() {
            root.to_owned()
        } else {
            root.join(OsStr::from_bytes(name))
        };
        assert!(
            path.parent()
                .is_some_and(|p| p.symlink_metadata().is_ok_and(|m| m.is_dir()))
        );

        let flag = header.as_bytes()[156];
        let is_directory = flag == b'5';
        if let Ok(there) = path.symlink_metadata() {
            if there.is_dir() && !is_directory {
                fs::remove_dir_all(&path).expect("removed");
            } else if !there.is_dir() {
                fs::remove_file(&path).expect("removed");
            }
        }
        let mknod = |kind| {
            let device = rustix::fs::makedev(
                header.device_major().expect("valid").unwrap_or(0),
                header.device_minor().expect("valid").unwrap_or(0),
            );
            rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(mode), device).expect("made");
        };
        match flag {
            b'0' => fs::write(&path, &content).expect("written"),
            b'1' => {
                fs::hard_link(root.join(OsStr::from_bytes(&link)), &path).expect("linked");
            }
            b'2' => symlink(OsStr::from_bytes(&link), &path).expect("linked"),
            b'3' => mknod(FileType::CharacterDevice),
            b'4' => mknod(FileType::BlockDevice),
            b'5' if path.is_dir() => {}
            b'5' => fs::create_dir(&path).expect("made"),
            b'6' => mknod(FileType::Fifo),
            other => panic!("unhandled tar header type {other}"),
        }
        let there = path.symlink_metadata().expect("there");
        if (there.uid(), there.gid()) != (uid, gid) {
            lchown(&path, Some(uid), Some(gid)).expect("changed");
        }
        if !there.is_symlink() {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("changed");
        }
        set_modified(&path, modified.0, modified.1);
        for (key, value) in &records {
            if let Some(attribute) = key.strip_prefix(b"SCHILY.xattr.") {
                rustix::fs::lsetxattr(&path, attribute, value, XattrFlags::empty()).expect("set");
            }
        }
        if is_directory {
            directories.push((path, modified));
        }
        records.clear();
    }
    assert!(
        rest.iter().all(|b| *b == 0) && rest.len() >= 1024,
        "the end of the archive"
    );
    for (path, modified) in directories {
        set_modified(&path, modified.0, modified.1);
    }
    for path in deleted {
        let path = resolved(root, path);
        match path.symlink_metadata() {
            Ok(there) if there.is_dir() => fs::remove_dir_all(&path).expect("removed"),
            Ok(_) => fs::remove_file(&path).expect("removed"),
            Err(_) => {}
        }
    }
}

/// `securejoin.SecureJoin`: follows links, the last component's too, but stays beneath the root.
fn resolved(root: &Path, path: &str) -> PathBuf {
    let mut waiting: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
    let mut inside = PathBuf::new();
    while let Some(part) = waiting.pop() {
        match part.as_str() {
            "" | "." => continue,
            ".." => {
                inside.pop();
                continue;
            }
            _ => {}
        }
        match fs::read_link(root.join(&inside).join(&part)) {
            Ok(target) => {
                let target = target.to_str().expect("text").to_owned();
                if target.starts_with('/') {
                    inside = PathBuf::new();
                }
                waiting.extend(target.split('/').rev().map(str::to_owned));
            }
            Err(_) => inside.push(part),
        }
    }
    root.join(inside)
}

fn expand(stored: &[u8], size: usize) -> Vec<u8> {
    let mut at = 0;
    let mut next = || {
        let end = at
            + stored[at..]
                .iter()
                .position(|b| *b == b'\n')
                .expect("a line");
        let text = std::str::from_utf8(&stored[at..end]).expect("text");
        at = end + 1;
        text.parse::<usize>().expect("a number")
    };
    let count = next();
    let extents: Vec<(usize, usize)> = (0..count).map(|_| (next(), next())).collect();
    let mut data = &stored[at.next_multiple_of(512)..];
    let mut content = vec![0; size];
    for (offset, length) in extents {
        content[offset..offset + length].copy_from_slice(&data[..length]);
        data = &data[length..];
    }
    assert!(data.is_empty());
    content
}

fn pax_time(value: &[u8]) -> (i64, i64) {
    let text = std::str::from_utf8(value).expect("text");
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let fraction: i64 = format!("{fraction:0<9}").parse().expect("digits");
    let whole: i64 = seconds.parse().expect("digits");
    if text.starts_with('-') && fraction > 0 {
        (whole - 1, 1_000_000_000 - fraction)
    } else {
        (whole, fraction)
    }
}

fn archive_of(delta: &Delta) -> (Vec<u8>, Summary) {
    let mut archive = Vec::new();
    let summary = delta.write_tar(&mut archive).expect("written");
    (archive, summary)
}

/// Carries one overlay's changes to another, and compares.
fn carry(from: &Overlay, to: &Overlay, told: &str) -> Summary {
    let delta = Delta::scan(&from.layers).expect("scanned");
    let (archive, summary) = archive_of(&delta);
    import(&to.layers.merged, &archive, delta.deleted());
    let parent = |path: &String| Path::new(&path[1..]).parent().expect("a parent").to_owned();
    let renewed = delta.deleted().iter().map(parent).collect();
    let carried = Carried::ByPodman { renewed: &renewed };
    assert_same(&from.layers.merged, &to.layers.merged, carried, told);
    summary
}

/// Runs one change through all kinds of overlay.
fn case(change: fn(&Path)) -> Vec<Summary> {
    let (send, got) = std::sync::mpsc::channel();
    in_namespace(move |base| {
        make_lower(base);
        for (number, options) in OPTIONS.iter().enumerate() {
            let from = Overlay::mount(base, &format!("from{number}"), options);
            let to = Overlay::mount(base, &format!("to{number}"), OPTIONS[0]);
            change(&from.layers.merged);
            send.send(carry(&from, &to, options)).expect("sent");
        }
    });
    got.iter().collect()
}

fn clean(summaries: &[Summary]) {
    for summary in summaries {
        assert_eq!(summary.skipped, []);
    }
}

#[test]
fn nothing_changed() {
    let summaries = case(|_| {});
    assert!(summaries.iter().all(|s| s.files == 0 && s.deleted == 0));
}

#[test]
fn files_added_changed_and_deleted() {
    let summaries = case(|root| {
        fs::write(root.join("etc/passwd"), "changed\n").expect("written");
        fs::write(root.join("usr/bin/new"), "new\n").expect("written");
        fs::remove_file(root.join("var/log/log")).expect("removed");
        fs::remove_file(root.join("home/user/notes")).expect("removed");
        set_modified(&root.join("usr/bin/new"), 1_234_567_890, 123_456_789);
        set_modified(&root.join("usr/bin"), -5, 250_000_000);
    });
    clean(&summaries);
    assert!(summaries.iter().all(|s| s.deleted == 2));
}

#[test]
fn the_root_directorys_own_mode_and_owner() {
    clean(&case(|root| {
        lchown(root, Some(7), Some(8)).expect("changed");
        fs::set_permissions(root, fs::Permissions::from_mode(0o1711)).expect("changed");
        set_attribute(root, "user.root", b"yes");
    }));
}

#[test]
fn owners_modes_and_attributes() {
    clean(&case(|root| {
        let mode = |path: &str, mode| {
            fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode))
                .expect("changed");
        };
        // Metadata alone: with metacopy the upper directory then has no content.
        lchown(root.join("usr/bin/tool"), Some(70_000), Some(3_000_000)).expect("changed");
        mode("usr/bin/tool", 0o6755);
        mode("etc/conf.d/a", 0o2600);
        mode("run", 0o1777);
        let capability =
            b"\x01\x00\x00\x02\x00\n\x00=\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
        set_attribute(
            &root.join("etc/conf.d/b"),
            "security.capability",
            &capability[..20],
        );
        set_attribute(&root.join("etc/conf.d/b"), "user.binary", b"\0\n=\xff");
        set_attribute(&root.join("etc/conf.d"), "user.empty", b"");
        set_attribute(&root.join("bin"), "trusted.note", b"on a symbolic link");
        symlink("anywhere", root.join("owned-link")).expect("linked");
        lchown(root.join("owned-link"), Some(5), Some(6)).expect("changed");
        set_modified(&root.join("owned-link"), 99, 5);
    }));
}

#[test]
fn directories_removed_and_made_again() {
    clean(&case(|root| {
        fs::remove_dir_all(root.join("usr/share")).expect("removed");
        fs::create_dir_all(root.join("usr/share/doc/pkg")).expect("made");
        fs::write(root.join("usr/share/doc/other"), "x").expect("written");
        fs::remove_dir_all(root.join("opt")).expect("removed");
        fs::remove_dir_all(root.join("etc/conf.d")).expect("removed");
        fs::create_dir(root.join("etc/conf.d")).expect("made");
        fs::write(root.join("etc/conf.d/b"), "another").expect("written");
        set_modified(&root.join("etc/conf.d"), 1000, 1);
    }));
}

#[test]
fn files_become_directories_and_the_reverse() {
    clean(&case(|root| {
        fs::remove_file(root.join("etc/passwd")).expect("removed");
        fs::create_dir(root.join("etc/passwd")).expect("made");
        fs::write(root.join("etc/passwd/x"), "x").expect("written");
        fs::remove_dir_all(root.join("usr/share")).expect("removed");
        fs::write(root.join("usr/share"), "a file").expect("written");
        fs::remove_file(root.join("bin")).expect("removed");
        fs::create_dir(root.join("bin")).expect("made");
        fs::write(root.join("bin/tool"), "not in usr").expect("written");
        fs::remove_dir_all(root.join("opt")).expect("removed");
        symlink("usr", root.join("opt")).expect("linked");
    }));
}

#[test]
fn a_deleted_symbolic_link_does_not_take_its_target_along() {
    let summaries = case(|root| {
        fs::remove_file(root.join("bin")).expect("removed");
        fs::remove_file(root.join("etc/tool")).expect("removed");
        fs::remove_file(root.join("doc")).expect("removed");
    });
    clean(&summaries);
    assert!(summaries.iter().all(|s| s.deleted == 3));
}

#[test]
fn hard_links() {
    clean(&case(|root| {
        fs::write(root.join("a"), "linked").expect("written");
        lchown(root.join("a"), Some(3), Some(4)).expect("changed");
        fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o4711)).expect("changed");
        set_attribute(&root.join("a"), "user.a", b"1");
        set_attribute(
            &root.join("a"),
            "security.capability",
            b"\x01\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        );
        fs::hard_link(root.join("a"), root.join("usr/b")).expect("linked");
        fs::hard_link(root.join("a"), root.join("z")).expect("linked");
        // A link to a file of the image: it is copied up.
        fs::hard_link(root.join("etc/conf.d/a"), root.join("etc/0-first")).expect("linked");
        // One of two names in the image is changed: they part.
        fs::write(root.join("linked-too"), "parted").expect("written");
        symlink("to", root.join("s1")).expect("linked");
        rustix::fs::linkat(CWD, root.join("s1"), CWD, root.join("s2"), AtFlags::empty())
            .expect("linked");
        make_node(&root.join("p1"), FileType::Fifo, 0, 0);
        fs::hard_link(root.join("p1"), root.join("p2")).expect("linked");
    }));
}

#[test]
fn special_files() {
    let summaries = case(|root| {
        make_node(&root.join("fifo"), FileType::Fifo, 0, 0);
        make_node(&root.join("null"), FileType::CharacterDevice, 1, 3);
        make_node(
            &root.join("high"),
            FileType::CharacterDevice,
            4095,
            1_048_575,
        );
        make_node(&root.join("block"), FileType::BlockDevice, 259, 70_000);
        drop(std::os::unix::net::UnixListener::bind(root.join("run/socket")).expect("bound"));
        // The comparison is of what can be carried.
        let root = root.to_owned();
        assert!(root.join("run/socket").exists());
        fs::remove_file(root.join("run/socket")).expect("removed");
    });
    clean(&summaries);
}

#[test]
fn sockets_are_reported_and_left_behind() {
    in_namespace(|base| {
        make_lower(base);
        let from = Overlay::mount(base, "from", OPTIONS[0]);
        let socket = from.layers.merged.join("run/socket");
        drop(std::os::unix::net::UnixListener::bind(socket).expect("bound"));
        let delta = Delta::scan(&from.layers).expect("scanned");
        let (_, summary) = archive_of(&delta);
        assert_eq!(summary.skipped.len(), 1);
        assert_eq!(summary.skipped[0].path, "/run/socket");
        assert_eq!(summary.files, 1, "the directory that it is in");
    });
}

#[test]
fn long_and_strange_names() {
    clean(&case(|root| {
        let long = "n".repeat(200);
        let deep = root.join(&long).join(&long).join("m".repeat(255));
        fs::create_dir_all(&deep).expect("made");
        fs::write(deep.join("file"), "deep").expect("written");
        fs::hard_link(deep.join("file"), root.join(&long).join("link")).expect("linked");
        fs::hard_link(root.join(&long).join("link"), root.join("zz")).expect("linked");
        symlink("t".repeat(4000), root.join("long-target")).expect("linked");
        let strange = root.join(OsStr::from_bytes(b"\xff\xfe\x01 \n name"));
        fs::create_dir(&strange).expect("made");
        fs::write(strange.join(OsStr::from_bytes(b"\x80")), "bytes").expect("written");
        for length in [98, 99, 100, 101] {
            fs::write(root.join("e".repeat(length)), "edge").expect("written");
            fs::create_dir(root.join("d".repeat(length))).expect("made");
            symlink("l".repeat(length), root.join(format!("s{length}"))).expect("linked");
        }
        fs::write(root.join("\u{1F680}"), "rocket").expect("written");
        fs::write(root.join(".wh.file"), "no whiteout here").expect("written");
        fs::write(root.join("BZh91AY"), "no bzip2 either").expect("written");
    }));
}

#[test]
fn a_name_that_is_not_utf8_cannot_be_deleted() {
    in_namespace(|base| {
        make_lower(base);
        fs::write(base.join("lower1").join(OsStr::from_bytes(b"\xff")), "x").expect("written");
        let from = Overlay::mount(base, "from", OPTIONS[0]);
        fs::remove_file(from.layers.merged.join(OsStr::from_bytes(b"\xff"))).expect("removed");
        let delta = Delta::scan(&from.layers).expect("scanned");
        let (_, summary) = archive_of(&delta);
        assert_eq!(delta.deleted(), [] as [String; 0]);
        assert_eq!(summary.skipped.len(), 1);
        assert!(summary.skipped[0].why.contains("not UTF-8"));
    });
}

#[test]
fn holes_cost_nothing() {
    let summaries = case(|root| {
        let file = File::create(root.join("sparse")).expect("made");
        file.set_len(64 << 20).expect("grown");
        std::os::unix::fs::FileExt::write_at(&file, b"begin", 0).expect("written");
        std::os::unix::fs::FileExt::write_at(&file, b"middle", 20 << 20).expect("written");
        let file = File::create(root.join("ends-with-data")).expect("made");
        std::os::unix::fs::FileExt::write_at(&file, b"end", 10 << 20).expect("written");
        File::create(root.join("only-a-hole"))
            .expect("made")
            .set_len(1 << 20)
            .expect("grown");
        File::create(root.join("small-hole"))
            .expect("made")
            .set_len(5000)
            .expect("grown");
    });
    clean(&summaries);
    for summary in summaries {
        assert!(summary.bytes < 100_000, "{summary:?}");
        assert!(summary.holes > 74 << 20, "{summary:?}");
    }
}

#[test]
fn a_huge_hole_is_not_read() {
    in_namespace(|base| {
        make_lower(base);
        let from = Overlay::mount(base, "from", OPTIONS[0]);
        let file = File::create(from.layers.merged.join("huge")).expect("made");
        file.set_len(1 << 42).expect("grown");
        let delta = Delta::scan(&from.layers).expect("scanned");
        assert_eq!(delta.bytes(), 1 << 42);
        let (archive, summary) = archive_of(&delta);
        assert!(archive.len() < 10_000);
        assert_eq!(summary.holes, 1 << 42);
    });
}

#[test]
fn many_extents_are_joined_until_the_map_fits() {
    let mut extents: Vec<Extent> = (0..100_000)
        .map(|n| Extent {
            offset: n * 8192,
            length: 4096,
        })
        .collect();
    fill_small_holes(&mut extents);
    assert!(extents.len() <= MAX_EXTENTS);
    assert_eq!(extents[0].offset, 0);
    let last = extents[extents.len() - 1];
    assert_eq!(last.offset + last.length, 99_999 * 8192 + 4096);
    // In order, and without overlap.
    assert!(
        extents
            .windows(2)
            .all(|w| w[0].offset + w[0].length <= w[1].offset)
    );
}

#[test]
fn renamed_directories() {
    in_namespace(|base| {
        make_lower(base);
        for (number, options) in OPTIONS[1..].iter().enumerate() {
            let from = Overlay::mount(base, &format!("from{number}"), options);
            let to = Overlay::mount(base, &format!("to{number}"), OPTIONS[0]);
            let root = &from.layers.merged;
            fs::rename(root.join("usr/share"), root.join("share")).expect("renamed");
            fs::write(root.join("share/doc/pkg/readme"), "changed after").expect("written");
            fs::rename(root.join("opt/app"), root.join("home/app")).expect("renamed");
            fs::rename(root.join("home"), root.join("houses")).expect("renamed");
            // Onto the name of another directory of the image.
            fs::remove_dir_all(root.join("var")).expect("removed");
            fs::rename(root.join("etc"), root.join("var")).expect("renamed");
            // A new one where the old one was.
            fs::create_dir(root.join("etc")).expect("made");
            fs::write(root.join("etc/new"), "new").expect("written");
            let mark = "trusted.overlay.redirect";
            let mut value = [0; 100];
            rustix::fs::getxattr(from.layers.upper.join("share"), mark, &mut value[..])
                .expect("the overlay renames without copying");
            carry(&from, &to, options);
        }
    });
}

#[test]
fn a_link_that_is_shortened_under_one_name_is_not_under_another() {
    case(|root| {
        symlink("../usr/bin/tool", root.join("first")).expect("linked");
        fs::create_dir(root.join("var/second")).expect("made");
        for name in ["var/second/name", "var/third"] {
            rustix::fs::linkat(
                CWD,
                root.join("first"),
                CWD,
                root.join(name),
                AtFlags::empty(),
            )
            .expect("linked");
        }
    });
}

#[test]
fn links_that_climb_above_the_root_are_shortened() {
    assert_eq!(clamped(b"../x", 1), None);
    assert_eq!(clamped(b"../x", 0), Some(b"x".to_vec()));
    assert_eq!(clamped(b"..//../..", 1), Some(b"../".to_vec()));
    assert_eq!(clamped(b"..", 0), Some(b".".to_vec()));
    assert_eq!(clamped(b"...", 0), None);
    assert_eq!(clamped(b"../..x", 0), Some(b"..x".to_vec()));
    assert_eq!(clamped(b"/../x", 0), None);
    assert_eq!(clamped(b"", 0), None);
}

#[test]
fn a_directory_that_is_no_overlay_is_refused() {
    let here = tempfile::tempdir().expect("a directory");
    let layers = Layers {
        upper: here.path().to_owned(),
        merged: here.path().to_owned(),
        lower: Vec::new(),
    };
    let error = Delta::scan(&layers).expect_err("no overlay");
    assert!(matches!(error, Error::NotOverlay { .. }));
    assert!(error.hint().is_some());
}

/// What a running container does to its files while they are read must not lead out of the tree.
#[test]
fn paths_do_not_lead_through_symbolic_links() {
    let base = tempfile::tempdir().expect("a directory");
    fs::create_dir(base.path().join("tree")).expect("made");
    fs::create_dir(base.path().join("outside")).expect("made");
    fs::write(base.path().join("outside/secret"), "s").expect("written");
    symlink("../outside", base.path().join("tree/out")).expect("linked");
    let root = base.path().join("tree");
    let tree = Tree::open(&root).expect("opened");
    assert!(tree.node(b"out").expect("looked").is_some());
    assert!(tree.node(b"out/secret").expect("looked").is_none());
    assert!(tree.list(b"out").expect("looked").is_empty());
}

/// GNU tar reads the archive as well: an opinion on the format that is not ours.
#[test]
fn gnu_tar_reads_it() {
    in_namespace(|base| {
        make_lower(base);
        let from = Overlay::mount(base, "from", OPTIONS[0]);
        let root = &from.layers.merged;
        let file = File::create(root.join("sparse")).expect("made");
        file.set_len(8 << 20).expect("grown");
        std::os::unix::fs::FileExt::write_at(&file, b"middle", 4 << 20).expect("written");
        let long = "n".repeat(150);
        fs::write(root.join(&long), "long name").expect("written");
        set_modified(&root.join(&long), 12_345, 678_900_000);
        fs::hard_link(root.join(&long), root.join("zlink")).expect("linked");
        lchown(root.join(&long), Some(3_000_000), Some(1)).expect("changed");
        let (archive, _) = archive_of(&Delta::scan(&from.layers).expect("scanned"));
        fs::write(base.join("delta.tar"), archive).expect("written");
        fs::create_dir(base.join("out")).expect("made");
        shell(&format!(
            "cd {} && tar -C out -xpf delta.tar",
            base.display()
        ));
        let out = base.join("out");
        assert_eq!(
            fs::read(out.join("sparse")).expect("read"),
            fs::read(root.join("sparse")).expect("read")
        );
        let meta = fs::metadata(out.join(&long)).expect("there");
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (12_345, 678_900_000));
        assert_eq!((meta.uid(), meta.nlink()), (3_000_000, 2));
    });
}

#[tokio::test]
async fn a_delta_file_leaves_nothing_behind() {
    // Only the spooling: layers that are no overlay fail before it.
    let here = tempfile::tempdir().expect("a directory");
    let mut file = unnamed_file(here.path()).expect("made");
    file.write_all(b"x").expect("written");
    assert_eq!(fs::read_dir(here.path()).expect("listed").count(), 0);
    let layers = Layers {
        upper: here.path().into(),
        merged: here.path().into(),
        lower: Vec::new(),
    };
    let made = DeltaFile::make(layers, here.path().into()).await;
    assert!(matches!(made, Err(Error::NotOverlay { .. })));
}

#[test]
fn two_hundred_random_operations() {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).expect("random bytes");
    let seed = std::env::var("LIVEMIG_TEST_SEED").map_or(u64::from_ne_bytes(seed), |seed| {
        seed.parse().expect("a number")
    });
    println!("LIVEMIG_TEST_SEED={seed}");
    in_namespace(move |base| {
        make_lower(base);
        for round in 0..12_u64 {
            let options = OPTIONS[round as usize % OPTIONS.len()];
            let mut random = Random(seed.wrapping_add(round).max(1));
            let from = Overlay::mount(base, &format!("from{round}"), options);
            let to = Overlay::mount(base, &format!("to{round}"), OPTIONS[0]);
            for _ in 0..200 {
                operate(&from.layers.merged, &mut random);
            }
            let told = format!("LIVEMIG_TEST_SEED={seed}, round {round} with {options}");
            carry(&from, &to, &told);
        }
    });
}
