//! Real overlays that tests change, and the comparison of all that two trees have.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::Layers;
use super::entries::{clamped, depth};
use super::tree::Tree;

/// Runs in a mount namespace of its own, which takes all mounts with it when the thread ends, with a
/// directory in memory.
pub(super) fn in_namespace(test: impl FnOnce(&Path) + Send + 'static) {
    in_namespace_with("mount -t tmpfs -o mode=755 none", "umount -l", test);
}

/// The same with a directory on a disk, where times are to be trusted.
pub(super) fn in_namespace_on_disk(test: impl FnOnce(&Path) + Send + 'static) {
    in_namespace_with("true", "true", test);
}

fn in_namespace_with(mount: &str, unmount: &str, test: impl FnOnce(&Path) + Send + 'static) {
    // /var/tmp is for what outlives a restart: no tmpfs, other than /tmp.
    let directory = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let path = directory.path().to_owned();
    let (mount, unmount) = (
        format!("{mount} {}", path.display()),
        format!("{unmount} {}", path.display()),
    );
    let thread = std::thread::spawn(move || {
        // SAFETY: a mount namespace changes what paths mean to this thread, nothing about memory;
        // file descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("a mount namespace: these tests need root");
        shell("mount --make-rprivate /");
        shell(&mount);
        test(&path);
        shell(&unmount);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(super) fn shell(script: &str) {
    let status = Command::new("sh")
        .args(["-ec", script])
        .status()
        .expect("sh");
    assert!(status.success(), "{script}");
}

/// The overlay's options that containers meet: the kernel's defaults, directories that can be
/// renamed, and metadata-only copies (`mountopt = "metacopy=on"` in storage.conf).
pub(super) const OPTIONS: [&str; 3] = [
    "redirect_dir=off",
    "redirect_dir=on",
    "redirect_dir=on,metacopy=on",
];

pub(super) struct Overlay {
    pub layers: Layers,
}

impl Overlay {
    pub fn mount(base: &Path, name: &str, options: &str) -> Overlay {
        let of = |part: &str| base.join(format!("{name}-{part}"));
        let (upper, work, merged) = (of("upper"), of("work"), of("merged"));
        let lower = vec![base.join("lower2"), base.join("lower1")];
        for directory in [&upper, &work, &merged] {
            fs::create_dir(directory).expect("made");
        }
        shell(&format!(
            "mount -t overlay -o {options},lowerdir={}:{},upperdir={},workdir={} none {}",
            lower[0].display(),
            lower[1].display(),
            upper.display(),
            work.display(),
            merged.display()
        ));
        Overlay {
            layers: Layers {
                upper,
                merged,
                lower,
            },
        }
    }
}

/// The image: two layers, the upper of which already changes the lower.
pub(super) fn make_lower(base: &Path) {
    let (one, two) = (base.join("lower1"), base.join("lower2"));
    for layer in [&one, &two] {
        fs::create_dir(layer).expect("made");
    }
    for directory in [
        "etc/conf.d",
        "usr/bin",
        "usr/share/doc/pkg",
        "home/user",
        "var/log",
        "run",
    ] {
        fs::create_dir_all(one.join(directory)).expect("made");
    }
    for file in [
        "etc/passwd",
        "etc/conf.d/a",
        "etc/conf.d/b",
        "usr/bin/tool",
        "usr/share/doc/pkg/readme",
        "usr/share/doc/pkg/licence",
        "home/user/notes",
        "var/log/log",
        "linked",
    ] {
        fs::write(one.join(file), format!("{file} of the image\n").repeat(40)).expect("written");
    }
    fs::hard_link(one.join("linked"), one.join("linked-too")).expect("linked");
    symlink("usr/bin", one.join("bin")).expect("linked");
    symlink("../usr/bin/tool", one.join("etc/tool")).expect("linked");
    symlink("/usr/share/doc", one.join("doc")).expect("linked");
    fs::set_permissions(one.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755))
        .expect("changed");
    lchown(one.join("home/user"), Some(1000), Some(1000)).expect("changed");
    set_attribute(&one.join("usr/bin/tool"), "user.from", b"image");
    // Second layer: a change, an addition, a whiteout.
    for directory in ["etc", "usr/share/doc/pkg", "opt/app/data"] {
        fs::create_dir_all(two.join(directory)).expect("made");
    }
    fs::write(two.join("etc/passwd"), "second layer\n").expect("written");
    fs::write(two.join("opt/app/data/file"), "data\n").expect("written");
    make_node(
        &two.join("usr/share/doc/pkg/licence"),
        FileType::CharacterDevice,
        0,
        0,
    );
}

pub(super) fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).expect("set");
}

pub(super) fn make_node(path: &Path, kind: FileType, major: u32, minor: u32) {
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).expect("made");
}

pub(super) fn set_modified(path: &Path, seconds: i64, nanoseconds: i64) {
    let at = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds as _,
    };
    let times = Timestamps {
        last_access: at,
        last_modification: at,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("set");
}

/// All that there is to know about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    device: u64,
    content: Vec<u8>,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    modified: Option<(i64, i64)>,
    /// The first name of the same file.
    link: PathBuf,
}

/// How files came from one tree to another.
#[derive(Debug, Clone, Copy)]
pub(super) enum Carried<'a> {
    /// Exactly.
    Exactly,
    /// In the form that Podman's import understands.
    ByPodman {
        /// Directories whose modification time is lost.
        renewed: &'a BTreeSet<PathBuf>,
    },
}

impl Carried<'_> {
    fn keeps_time(&self, path: &Path) -> bool {
        match self {
            Carried::Exactly => true,
            Carried::ByPodman { renewed } => !renewed.contains(path),
        }
    }
}

/// All files of a tree.
fn facts(root: &Path, carried: Carried<'_>) -> BTreeMap<PathBuf, Facts> {
    let mut all = BTreeMap::new();
    let mut links: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let tree = Tree::open(root).expect("opened");
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let node = tree.node(&path).expect("read").expect("there");
        let full = root.join(OsStr::from_bytes(&path));
        let relative = PathBuf::from(std::ffi::OsString::from_vec(path.clone()));
        let meta = full.symlink_metadata().expect("there");
        let mut content = Vec::new();
        let mut parted = false;
        if meta.is_dir() {
            for (name, _) in tree.list(&path).expect("listed").into_iter().rev() {
                let child = if path.is_empty() {
                    name
                } else {
                    [&path[..], b"/", &name].concat()
                };
                waiting.push(child);
            }
        } else if meta.is_symlink() {
            content = fs::read_link(&full)
                .expect("read")
                .into_os_string()
                .into_vec();
            if let Carried::ByPodman { .. } = carried {
                // Links that climb too far are shortened on purpose.
                let first = links
                    .entry((meta.dev(), meta.ino()))
                    .or_insert(relative.clone());
                let first = first.as_os_str().as_bytes();
                parted = clamped(&content, depth(first)).is_some();
                content = clamped(&content, depth(&path)).unwrap_or(content);
            }
        } else if meta.is_file() {
            content = fs::read(&full).expect("read");
        }
        let attributes = node.attribute_names().expect("listed").into_iter();
        let attributes = attributes
            .map(|name| {
                (
                    name.clone(),
                    node.attribute(&name).expect("read").expect("there"),
                )
            })
            .collect();
        let link = if meta.nlink() > 1 && !meta.is_dir() && !parted {
            links
                .entry((meta.dev(), meta.ino()))
                .or_insert(relative.clone())
                .clone()
        } else {
            relative.clone()
        };
        let facts = Facts {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            device: if meta.is_dir() { 0 } else { meta.rdev() },
            content,
            attributes,
            modified: carried
                .keeps_time(&relative)
                .then(|| (meta.mtime(), meta.mtime_nsec())),
            link,
        };
        all.insert(relative, facts);
    }
    all
}

/// Compares two trees completely.
pub(super) fn assert_same(here: &Path, there: &Path, carried: Carried<'_>, told: &str) {
    let (here, there) = (facts(here, carried), facts(there, carried));
    for (path, expected) in &here {
        let got = there.get(path);
        assert!(
            got == Some(expected),
            "{told}: {path:?}\nis     {got:?}\nnot as {expected:?}"
        );
    }
    let extra: Vec<_> = there
        .keys()
        .filter(|path| !here.contains_key(*path))
        .collect();
    assert!(extra.is_empty(), "{told}: should not be there: {extra:?}");
}

/// Random numbers that a failed run can be repeated with (xorshift64*).
pub(super) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}

pub(super) fn paths(root: &Path, directories: bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).expect("listed") {
            let path = entry.expect("an entry").path();
            let is_directory = path.symlink_metadata().expect("there").is_dir();
            if is_directory {
                waiting.push(path.clone());
            }
            if is_directory == directories {
                found.push(path);
            }
        }
    }
    if directories {
        found.push(root.to_owned());
    }
    found.sort();
    found
}

/// One of the things that programs do to files. Failures are part of life.
pub(super) fn operate(root: &Path, random: &mut Random) {
    let (files, directories) = (paths(root, false), paths(root, true));
    if files.is_empty() {
        return fs::write(root.join("again"), "again").expect("written");
    }
    let directory = &directories[random.below(directories.len())];
    let file = &files[random.below(files.len())];
    let new = directory.join(format!("n{}", random.below(12)));
    let other = directories[random.below(directories.len())].join(format!("n{}", random.below(12)));
    let modes = [0o644, 0o755, 0o4755, 0o2710, 0o600, 0o000];
    let content = vec![b'a' + random.below(26) as u8; random.below(9000)];
    let is_plain = |path: &Path| path.symlink_metadata().is_ok_and(|m| m.is_file());
    match random.below(17) {
        0 | 1 if !new.exists() || is_plain(&new) => drop(fs::write(&new, content)),
        2 if is_plain(file) => {
            let opened = fs::OpenOptions::new().append(true).open(file);
            drop(opened.map(|mut f| f.write_all(b"appended")));
        }
        3 if is_plain(file) => {
            let mode = fs::Permissions::from_mode(modes[random.below(modes.len())]);
            drop(fs::set_permissions(file, mode));
        }
        4 => drop(fs::set_permissions(
            directory,
            fs::Permissions::from_mode(0o755 | 0o2000),
        )),
        5 => drop(lchown(file, Some(random.below(3) as u32 * 1000), Some(5))),
        6 => drop(fs::create_dir(&new)),
        7 => drop(fs::remove_file(file)),
        // Seldom, or nothing would be left to operate on.
        8 if directory != root && random.below(4) == 0 => drop(fs::remove_dir_all(directory)),
        9 if directory != root && random.below(3) == 0 => {
            drop(fs::remove_dir_all(directory));
            drop(fs::create_dir(directory));
        }
        10 => drop(fs::rename(file, &new)),
        11 if directory != root => drop(fs::rename(directory, &other)),
        12 => {
            let _ = rustix::fs::linkat(CWD, file, CWD, &new, AtFlags::empty());
        }
        13 => drop(symlink(file.strip_prefix(root).expect("inside"), &new)),
        14 => {
            let kinds = [(FileType::Fifo, 0, 0), (FileType::CharacterDevice, 1, 5)];
            let (kind, major, minor) = kinds[random.below(2)];
            let device = rustix::fs::makedev(major, minor);
            let _ = rustix::fs::mknodat(CWD, &new, kind, Mode::from_raw_mode(0o600), device);
        }
        15 if is_plain(file) => {
            let name = format!("user.{}", random.below(3));
            let _ = rustix::fs::lsetxattr(
                file,
                name,
                &content[..content.len().min(40)],
                XattrFlags::empty(),
            );
        }
        _ => {
            let name = format!("user.d{}", random.below(3));
            let _ = rustix::fs::lsetxattr(directory, name, b"v", XattrFlags::empty());
        }
    }
}
