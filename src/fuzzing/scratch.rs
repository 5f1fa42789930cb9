//! A place in memory for what a reader writes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A directory in memory that goes away with the value.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!(
            "/dev/shm/livemig-fuzzing-{}-{number}",
            std::process::id()
        ));
        fs::create_dir(&path).expect("room in /dev/shm");
        Scratch(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // At worst it stays behind.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Trees of a container to write to, with neighbours that are none of an archive's business, and links
/// that lead there.
pub(crate) struct Trees(Scratch);

impl Trees {
    const SECRET: &'static str = "outside/deep/secret";

    pub(crate) fn new() -> Trees {
        let here = Scratch::new();
        let make = |path: &str| fs::create_dir_all(here.path().join(path));
        for directory in ["tree/etc", "shm", "data", "outside/deep"] {
            make(directory).expect("made");
        }
        let write = |path: &str| fs::write(here.path().join(path), path);
        write(Trees::SECRET).expect("written");
        write("tree/etc/passwd").expect("written");
        for (target, link) in [
            ("../outside", "tree/out"),
            ("/", "tree/root"),
            ("etc", "tree/inside"),
            ("../outside/deep/secret", "shm/secret"),
        ] {
            symlink(target, here.path().join(link)).expect("linked");
        }
        Trees(here)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// What is outside of the trees: names, kinds, modes, owners, numbers of links, and content.
    pub(crate) fn outside(&self) -> Vec<String> {
        use std::os::unix::fs::MetadataExt;
        let mut seen: Vec<String> = fs::read_dir(self.path())
            .expect("there")
            .map(|entry| entry.expect("read").file_name().display().to_string())
            .collect();
        seen.sort();
        for path in ["", "outside", "outside/deep", Trees::SECRET] {
            let about = fs::symlink_metadata(self.path().join(path)).expect("there");
            seen.push(format!(
                "{path} {:o} {} {} {} {:?}",
                about.mode(),
                about.uid(),
                about.gid(),
                about.nlink(),
                about.modified().expect("a time")
            ));
        }
        seen.push(fs::read_to_string(self.path().join(Trees::SECRET)).expect("read"));
        seen
    }
}
