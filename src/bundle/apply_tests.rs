//! A table of tricks, each refused by name, with nothing touched outside.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use super::super::archive::{self, Head};
use super::*;

/// An entry as livemig writes it, which a case then changes.
fn head<'a>(path: &'a str, kind: Type) -> Head<'a> {
    Head {
        kind,
        mode: 0o644,
        ..Head::empty(path.as_bytes())
    }
}

fn file(path: &str, content: &[u8]) -> Vec<u8> {
    let mut entry = Vec::new();
    let head = Head {
        size: content.len() as u64,
        ..head(path, Type::Regular)
    };
    head.write(&mut entry).expect("written");
    entry.extend_from_slice(content);
    archive::pad(&mut entry, content.len() as u64).expect("written");
    entry
}

fn entry(head: Head<'_>) -> Vec<u8> {
    let mut entry = Vec::new();
    head.write(&mut entry).expect("written");
    entry
}

fn link(path: &str, kind: Type, target: &str) -> Vec<u8> {
    entry(Head {
        target: target.as_bytes(),
        ..head(path, kind)
    })
}

fn directory(path: &str) -> Vec<u8> {
    entry(head(path, Type::Directory))
}

fn removal(path: &str) -> Vec<u8> {
    entry(head(path, Type::Removal))
}

/// Header blocks that livemig's writer would not make: the block is changed, its sum set right.
fn raw(path: &str, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut block = entry(head(path, Type::Regular));
    change(&mut block);
    let sum = archive::checksum(block[..512].try_into().expect("a block"));
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A tree to write to, with a neighbour that is none of the archive's business.
struct Here(tempfile::TempDir);

impl Here {
    fn new() -> Here {
        let here = tempfile::tempdir().expect("a directory");
        for directory in ["tree/etc", "shm", "outside/deep"] {
            fs::create_dir_all(here.path().join(directory)).expect("made");
        }
        fs::write(here.path().join("outside/secret"), "untouched").expect("written");
        fs::write(here.path().join("outside/deep/x"), "untouched").expect("written");
        fs::write(here.path().join("tree/etc/passwd"), "root").expect("written");
        // As an image may have them.
        symlink("../outside", here.path().join("tree/out")).expect("linked");
        symlink("/", here.path().join("tree/root")).expect("linked");
        symlink("etc", here.path().join("tree/inside")).expect("linked");
        Here(here)
    }

    fn at(&self, path: &str) -> std::path::PathBuf {
        self.0.path().join(path)
    }

    fn apply(&self, entries: &[Vec<u8>], limits: Limits) -> Result<Applied> {
        let mut archive = entries.concat();
        archive::end(&mut archive).expect("written");
        self.apply_bytes(&archive, limits)
    }

    fn apply_bytes(&self, archive: &[u8], limits: Limits) -> Result<Applied> {
        let targets = |tree: &TreeId| match tree {
            TreeId::Rootfs => Some(self.at("tree")),
            TreeId::Shm => Some(self.at("shm")),
            TreeId::Volume(_) => None,
        };
        let mut applier = Applier::new(targets, limits);
        for piece in archive.chunks(700) {
            applier.feed(piece)?;
        }
        applier.finish()
    }

    /// Everything outside of the trees is as it was.
    fn is_untouched(&self) {
        for file in ["outside/secret", "outside/deep/x"] {
            let meta = fs::metadata(self.at(file)).expect("still there");
            assert_eq!(fs::read(self.at(file)).expect("read"), b"untouched");
            assert_eq!((meta.nlink(), meta.mode() & 0o7777), (1, 0o644));
        }
        let names = |path: &Path| fs::read_dir(path).expect("listed").count();
        assert_eq!(names(&self.at("outside")), 2);
        assert_eq!(names(&self.at("outside/deep")), 1);
        assert_eq!(names(self.0.path()), 3);
    }
}

#[test]
fn tricks_are_refused() {
    let long = |length: usize| "n".repeat(length);
    let deep = "d/".repeat(1800);
    let xattr = |name: &str| {
        entry(Head {
            attributes: &[(name.as_bytes().to_vec(), b"y".to_vec())],
            ..head("rootfs/etc", Type::Directory)
        })
    };
    let absolute = format!("{}/outside/secret", std::env::temp_dir().display());
    use Refusal as R;
    let cases: Vec<(&str, Vec<Vec<u8>>, Refusal)> = vec![
        // Names.
        ("absolute", vec![file("/etc/x", b"x")], R::NoTree),
        ("no tree", vec![file("etc/x", b"x")], R::NoTree),
        ("empty", vec![file("", b"x")], R::NoTree),
        ("no slash", vec![file("rootfs", b"x")], R::NoTree),
        (
            "a tree that is not there",
            vec![file("volumes/data/x", b"x")],
            R::NoTree,
        ),
        (
            "a volume without a name",
            vec![file("volumes//x", b"x")],
            R::NoTree,
        ),
        (
            "a volume without a path",
            vec![file("volumes/data", b"x")],
            R::NoTree,
        ),
        (
            "up in the tree's name",
            vec![file("volumes/../x", b"x")],
            R::NoTree,
        ),
        ("up", vec![file("rootfs/../outside/secret", b"x")], R::Path),
        (
            "up in the middle",
            vec![file("rootfs/etc/../../outside/secret", b"x")],
            R::Path,
        ),
        ("up at the end", vec![directory("rootfs/etc/..")], R::Path),
        ("here", vec![file("rootfs/./etc/x", b"x")], R::Path),
        (
            "absolute in a tree",
            vec![file("rootfs//etc/x", b"x")],
            R::Path,
        ),
        ("two slashes", vec![file("rootfs/etc//x", b"x")], R::Path),
        (
            "a file with a slash at its end",
            vec![file("rootfs/etc/", b"x")],
            R::Path,
        ),
        (
            "a long name",
            vec![file(&format!("rootfs/{}", long(256)), b"x")],
            R::LongPath,
        ),
        (
            "a long path",
            vec![file(&format!("rootfs/{deep}x"), b"x")],
            R::LongPath,
        ),
        (
            "removal of what is above",
            vec![removal("rootfs/..")],
            R::Path,
        ),
        // Links of the image, and links that the archive has made itself.
        (
            "through the image's link",
            vec![file("rootfs/out/secret", b"x")],
            R::ThroughLink,
        ),
        (
            "through a link to the root",
            vec![file("rootfs/root/x", b"x")],
            R::ThroughLink,
        ),
        (
            "through a link within",
            vec![file("rootfs/inside/x", b"x")],
            R::ThroughLink,
        ),
        (
            "through its own link",
            vec![
                link("rootfs/mine", Type::Symlink, "../outside"),
                file("rootfs/mine/secret", b"x"),
            ],
            R::ThroughLink,
        ),
        (
            "through its own absolute link",
            vec![
                link("rootfs/mine", Type::Symlink, &absolute),
                file("rootfs/mine/secret", b"x"),
            ],
            R::ThroughLink,
        ),
        (
            "a directory that becomes a link",
            vec![
                directory("rootfs/mine"),
                file("rootfs/mine/a", b"a"),
                link("rootfs/mine", Type::Symlink, "../outside"),
                file("rootfs/mine/secret", b"x"),
            ],
            R::ThroughLink,
        ),
        (
            "a magic link",
            vec![
                link("rootfs/mine", Type::Symlink, "/proc/self/root"),
                file("rootfs/mine/x", b"x"),
            ],
            R::ThroughLink,
        ),
        (
            "a removal through a link",
            vec![removal("rootfs/out/secret")],
            R::ThroughLink,
        ),
        (
            "a directory through a link",
            vec![directory("rootfs/out/new")],
            R::ThroughLink,
        ),
        (
            "a special file through a link",
            vec![entry(head("rootfs/out/p", Type::Fifo))],
            R::ThroughLink,
        ),
        (
            "a link through a link",
            vec![link("rootfs/out/l", Type::Symlink, "x")],
            R::ThroughLink,
        ),
        // Hard links.
        (
            "to an absolute path",
            vec![link("rootfs/l", Type::HardLink, &absolute)],
            R::LinkTarget,
        ),
        (
            "to what is above",
            vec![link("rootfs/l", Type::HardLink, "rootfs/../outside/secret")],
            R::LinkTarget,
        ),
        (
            "to another tree",
            vec![
                file("shm/a", b"a"),
                link("rootfs/l", Type::HardLink, "shm/a"),
            ],
            R::LinkTarget,
        ),
        (
            "to a relative path",
            vec![link("rootfs/l", Type::HardLink, "etc/passwd")],
            R::LinkTarget,
        ),
        (
            "to itself",
            vec![link(
                "rootfs/etc/passwd",
                Type::HardLink,
                "rootfs/etc/passwd",
            )],
            R::LinkTarget,
        ),
        (
            "to the root",
            vec![link("rootfs/l", Type::HardLink, "rootfs/")],
            R::LinkTarget,
        ),
        (
            "to nothing",
            vec![link("rootfs/l", Type::HardLink, "")],
            R::LinkTarget,
        ),
        (
            "through a link, to a file outside",
            vec![link("rootfs/l", Type::HardLink, "rootfs/out/secret")],
            R::ThroughLink,
        ),
        // Kinds.
        (
            "a character device",
            vec![entry(Head {
                device: (1, 1),
                ..head("rootfs/mem", Type::Character)
            })],
            R::Device,
        ),
        (
            "a block device",
            vec![entry(Head {
                device: (8, 0),
                ..head("rootfs/sda", Type::Block)
            })],
            R::Device,
        ),
        (
            "a kind that nobody knows",
            vec![raw("rootfs/x", |b| b[156] = b'7')],
            R::Head,
        ),
        (
            "an old regular file",
            vec![raw("rootfs/x", |b| b[156] = 0)],
            R::Head,
        ),
        (
            "a removal with content",
            vec![raw("rootfs/x", |b| {
                b[156] = b'W';
                b[124..135].copy_from_slice(b"00000001000");
            })],
            R::Head,
        ),
        (
            "the root as a link",
            vec![link("rootfs/", Type::Symlink, "../outside")],
            R::Root,
        ),
        ("the root as a file", vec![file("rootfs/", b"x")], R::Root),
        // Attributes.
        (
            "an overlay's mark",
            vec![xattr("trusted.overlay.opaque")],
            R::Attribute,
        ),
        (
            "an overlay's way out",
            vec![xattr("trusted.overlay.redirect")],
            R::Attribute,
        ),
        ("a label", vec![xattr("security.selinux")], R::Attribute),
        (
            "a system attribute",
            vec![xattr("system.nfs4_acl")],
            R::Attribute,
        ),
        ("no attribute's name", vec![xattr("")], R::Attribute),
    ];
    for (told, entries, expected) in cases {
        let here = Here::new();
        let error = here.apply(&entries, Limits::default()).expect_err(told);
        match &error {
            Error::Entry { why, .. } => assert_eq!(*why, expected, "{told}: {error}"),
            other => panic!("{told}: {other:?}"),
        }
        here.is_untouched();
    }
}

#[test]
fn nothing_is_written_through_what_is_there() {
    let here = Here::new();
    fs::hard_link(here.at("outside/secret"), here.at("tree/shared")).expect("linked");
    let entries = [
        // The last name is a link: it is replaced, and what it leads to is left alone.
        file("rootfs/out", b"x"),
        link("rootfs/mine", Type::Symlink, "../outside/secret"),
        file("rootfs/mine", b"x"),
        directory("rootfs/root"),
        // A file that has a name outside as well.
        file("rootfs/shared", b"x"),
    ];
    here.apply(&entries, Limits::default()).expect("applied");
    for name in ["out", "mine", "shared"] {
        assert_eq!(fs::read(here.at("tree").join(name)).expect("read"), b"x");
    }
    here.is_untouched();
}

#[test]
fn what_is_removed_is_not_followed() {
    let here = Here::new();
    fs::create_dir_all(here.at("tree/d/e/f")).expect("made");
    symlink("../../outside", here.at("tree/d/out")).expect("linked");
    symlink("/", here.at("tree/d/e/f/root")).expect("linked");
    let entries = [
        removal("rootfs/d"),
        removal("rootfs/out"),
        removal("rootfs/not/there"),
        removal("rootfs/etc/passwd/below-a-file"),
    ];
    let applied = here.apply(&entries, Limits::default()).expect("applied");
    assert_eq!(applied.removals, 4);
    assert!(!here.at("tree/d").exists());
    assert!(here.at("tree/out").symlink_metadata().is_err());
    here.is_untouched();
    here.apply(&[removal("rootfs/")], Limits::default())
        .expect("applied");
    assert_eq!(fs::read_dir(here.at("tree")).expect("listed").count(), 0);
    here.is_untouched();
}

#[test]
fn limits_hold() {
    let here = Here::new();
    let limits = Limits {
        entries: 2,
        bytes: 1000,
        devices: false,
    };
    let three = [
        file("rootfs/a", b""),
        removal("rootfs/b"),
        file("rootfs/c", b""),
    ];
    let error = here.apply(&three, limits).expect_err("too many");
    assert!(
        matches!(error, Error::TooManyEntries { limit: 2 }),
        "{error}"
    );
    let error = here
        .apply(&[file("rootfs/a", &[7; 1001])], limits)
        .expect_err("too long");
    assert!(matches!(error, Error::TooLong { limit: 1000 }), "{error}");
    // A hole is no content, and takes no room.
    let extents = [Extent {
        offset: 1 << 40,
        length: 0,
    }];
    let mut hole = entry(Head {
        size: 1 << 40,
        extents: Some(&extents),
        ..head("rootfs/hole", Type::Regular)
    });
    archive::pad(&mut hole, 0).expect("written");
    here.apply(&[hole], limits).expect("applied");
    let hole = fs::metadata(here.at("tree/hole")).expect("there");
    assert_eq!((hole.len(), hole.blocks()), (1 << 40, 0));
}

#[test]
fn maps_that_are_wrong_are_refused() {
    let sparse = |map: &str, data: usize, size: u64| {
        let record = |key: &str, value: &str| {
            let mut records = Vec::new();
            archive::record(&mut records, key.as_bytes(), value.as_bytes());
            records
        };
        let records = [
            record("GNU.sparse.major", "1"),
            record("GNU.sparse.minor", "0"),
            record("GNU.sparse.name", "rootfs/sparse"),
            record("GNU.sparse.realsize", &size.to_string()),
        ]
        .concat();
        let mut stored = map.as_bytes().to_vec();
        stored.resize(stored.len().next_multiple_of(512), 0);
        stored.resize(stored.len() + data, b'd');
        let mut extended = raw("PaxHeader", |block| {
            block[156] = b'x';
            block[124..135].copy_from_slice(format!("{:011o}", records.len()).as_bytes());
        });
        extended.extend(&records);
        archive::pad(&mut extended, records.len() as u64).expect("written");
        extended.extend(file("GNUSparseFile.0/entry", &stored));
        extended
    };
    let here = Here::new();
    let good = here.apply(&[sparse("1\n5\n3\n", 3, 10)], Limits::default());
    good.expect("applied");
    assert_eq!(
        fs::read(here.at("tree/sparse")).expect("read"),
        b"\0\0\0\0\0ddd\0\0"
    );
    // It would be read again with each of the lines that follow it.
    let long = format!("{}16000\n{}", "0".repeat(900_000), "0\n".repeat(32_000));
    for (told, map, data, size) in [
        ("a number without an end", long.as_str(), 0, 10),
        ("empty", "", 0, 10),
        ("no number", "x\n", 0, 10),
        ("a sign", "1\n+5\n3\n", 3, 10),
        ("a negative one", "1\n-5\n3\n", 3, 10),
        ("cut", "2\n0\n1\n", 1, 10),
        ("less data than it says", "1\n5\n3\n", 2, 10),
        ("more data than it says", "1\n5\n3\n", 4, 10),
        ("behind the end", "1\n8\n3\n", 3, 10),
        ("backwards", "2\n5\n1\n0\n1\n", 2, 10),
        ("overlapping", "2\n0\n2\n1\n2\n", 4, 10),
        ("beyond all numbers", "1\n18446744073709551615\n3\n", 3, 10),
        ("too many", "99999\n", 0, 10),
        ("far too many", "99999999999999999999\n", 0, 10),
    ] {
        let refused = here.apply(&[sparse(map, data, size)], Limits::default());
        let refused = refused.expect_err(told);
        let is_map = matches!(
            refused,
            Error::Entry {
                why: Refusal::Map,
                ..
            }
        );
        assert!(is_map, "{told}: {refused:?}");
    }
}

#[test]
fn what_is_no_archive_of_livemigs_is_refused() {
    let here = Here::new();
    let limits = Limits::default();
    let error = here
        .apply_bytes(&[b'z'; 2048], limits)
        .expect_err("garbage");
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    let error = here.apply_bytes(b"", limits).expect_err("empty");
    assert!(matches!(error, Error::Truncated { bytes: 0 }), "{error:?}");
    let whole = [file("rootfs/etc/new", &[7; 3000]), directory("rootfs/d")].concat();
    for cut in (0..=whole.len()).step_by(128) {
        let error = here.apply_bytes(&whole[..cut], limits).expect_err("cut");
        assert!(matches!(error, Error::Truncated { .. }), "{cut}: {error:?}");
    }
    // Headers that readers take differently.
    for flag in [b'L', b'K', b'g'] {
        let long = raw("rootfs/x", |block| block[156] = flag);
        let error = here.apply(&[long], limits).expect_err("ambiguous");
        assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    }
    here.is_untouched();
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_its_own_error() {
    let here = Here::new();
    let tree = here.at("tree");
    let pieces = [
        Ok(Bytes::from(file("rootfs/a", &[7; 1024])[..700].to_vec())),
        Err(Error::Upstream("cut".into())),
    ];
    let targets = move |_: &TreeId| Some(tree.clone());
    let broken = apply(futures::stream::iter(pieces), targets, Limits::default()).await;
    assert!(matches!(broken, Err(Error::Upstream(_))), "{broken:?}");
}

#[test]
fn a_mount_in_a_tree_is_not_entered() {
    super::super::test_trees::in_namespace(|base| {
        use super::super::test_trees::shell;
        fs::create_dir_all(base.join("tree/mnt")).expect("made");
        shell(&format!("mount -t tmpfs none {}/tree/mnt", base.display()));
        fs::write(base.join("tree/mnt/x"), "untouched").expect("written");
        for (told, trick) in [
            ("a file", file("rootfs/mnt/x", b"x")),
            ("a removal", removal("rootfs/mnt/x")),
            ("a removal of the mount", removal("rootfs/mnt")),
            ("a removal of everything", removal("rootfs/")),
        ] {
            let mut archive = trick;
            archive::end(&mut archive).expect("written");
            let mut applier = Applier::new(|_: &TreeId| Some(base.join("tree")), Limits::default());
            let error = applier.feed(&archive).expect_err(told);
            let refused = matches!(
                error,
                Error::Entry {
                    why: Refusal::OutOfTree,
                    ..
                }
            );
            assert!(refused, "{told}: {error:?}");
            assert_eq!(
                fs::read(base.join("tree/mnt/x")).expect("read"),
                b"untouched"
            );
        }
    });
}
