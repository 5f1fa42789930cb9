//! What this host offers for checkpoints and restores.
//!
//! Both hosts of a migration find this out for themselves and compare ([`super::check`]), so that
//! what cannot work is refused before anything is stopped.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{NetworkLock, Version};

/// A program that has not answered by then is treated as if it were not there.
const PATIENCE: Duration = Duration::from_secs(10);
/// More output than this is not looked at.
const MAX_OUTPUT: usize = 64 << 10;

/// What a host offers for checkpoints and restores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// The machine's architecture as `uname -m` has it, such as `x86_64`.
    pub architecture: String,
    /// The kernel's release, such as `6.12.41-amd64`.
    pub kernel_release: String,
    /// The same as numbers.
    pub kernel: Version,
    /// CRIU, if it is installed.
    pub criu: Option<Criu>,
    /// The library through which crun uses CRIU, `libcriu.so.2`, if it is where the dynamic linker
    /// looks.
    pub libcriu: Option<PathBuf>,
    /// The OCI runtimes that were found.
    pub runtimes: Vec<Runtime>,
    /// How CRIU keeps packets away.
    pub network_lock: NetworkLock,
    /// What the processor can do: the flags of `/proc/cpuinfo`. Empty on architectures whose file
    /// has none.
    pub cpu_flags: BTreeSet<String>,
    /// Whether this was found out as root. Without root neither CRIU nor Podman can do any of it.
    pub root: bool,
}

/// CRIU and what it says that it can do on this kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Criu {
    /// Its version.
    pub version: Version,
    /// Why `criu check` was not content, if it was not: its error lines.
    pub complaint: Option<String>,
    /// Memory that changed between rounds can be told (`mem_dirty_track`: soft-dirty bits), so
    /// there can be pre-copy.
    pub dirty_tracking: bool,
    /// Memory can be fetched after the restore (`uffd-noncoop`, and pipes that are large enough), so there
    /// can be post-copy.
    pub lazy_pages: bool,
    /// Memory is scanned by one system call (`pagemap_scan`), which is quick.
    pub pagemap_scan: bool,
    /// `network-lock nftables` works here.
    pub nftables_lock: bool,
}

/// An OCI runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// `crun` or `runc`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its version, if it told one.
    pub version: Option<Version>,
}

impl Features {
    /// Finds out about this host. It never fails: what cannot be found out is not offered.
    ///
    /// It runs `criu` and the runtimes to ask them, with a bound of 10 s on each; together they
    /// take a fraction of a second.
    pub async fn of_this_host() -> Features {
        let name = rustix::system::uname();
        let kernel_release = name.release().to_string_lossy().into_owned();
        let (criu, crun, runc) = tokio::join!(criu(), runtime("crun"), runtime("runc"));
        Features {
            architecture: name.machine().to_string_lossy().into_owned(),
            kernel: Version::find(&kernel_release).unwrap_or_default(),
            kernel_release,
            criu,
            libcriu: library("libcriu.so.2", Path::new("/")),
            runtimes: [crun, runc].into_iter().flatten().collect(),
            network_lock: NetworkLock::read(
                Path::new("/etc/criu"),
                in_path("iptables-restore").is_some(),
            ),
            cpu_flags: cpu_flags(&bounded(Path::new("/proc/cpuinfo"), 64 << 10)),
            root: rustix::process::geteuid().is_root(),
        }
    }

    /// The runtime of that name.
    pub fn runtime(&self, name: &str) -> Option<&Runtime> {
        self.runtimes.iter().find(|runtime| runtime.name == name)
    }
}

/// What a program printed, and whether it was content.
struct Answer {
    success: bool,
    output: String,
}

async fn ask(program: &Path, arguments: &[&str]) -> Option<Answer> {
    let mut command = Command::new(program);
    // CRIU takes the current directory for its work directory.
    command
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .ok()?
        .ok()?;
    let text =
        |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_OUTPUT)]).into_owned();
    Some(Answer {
        success: output.status.success(),
        output: text(&output.stdout) + &text(&output.stderr),
    })
}

async fn criu() -> Option<Criu> {
    let program = in_path("criu")?;
    let version = Version::find(&ask(&program, &["--version"]).await?.output)?;
    // The first one looks the kernel over and keeps what it found in /run/criu.kdat for the rest.
    let general = ask(&program, &["check"]).await;
    let feature = async |name| {
        let answer = ask(&program, &["check", "--feature", name]).await;
        answer.is_some_and(|answer| answer.success)
    };
    let (dirty_tracking, lazy_pages, pagemap_scan, nftables_lock) = tokio::join!(
        feature("mem_dirty_track"),
        feature("uffd-noncoop"),
        feature("pagemap_scan"),
        feature("network_lock_nftables"),
    );
    let lazy_pages = lazy_pages && pipes_are_large();
    let complaint = match general {
        None => Some("`criu check` did not answer".to_owned()),
        Some(Answer { success: true, .. }) => None,
        Some(Answer { output, .. }) => Some(complaint(&output)),
    };
    Some(Criu {
        version,
        complaint,
        dirty_tracking,
        lazy_pages,
        pagemap_scan,
        nftables_lock,
    })
}

/// Whether CRIU can have the pipes through which it serves memory later (`pipe_read_dest_init` in
/// `criu/page-pipe.c`: 4 MiB). If it cannot, it fails when the container runs at the destination already.
fn pipes_are_large() -> bool {
    const WANTED: u64 = 4 << 20;
    /// `CAP_SYS_RESOURCE` of `linux/capability.h`: no bound holds.
    const SYS_RESOURCE: u64 = 1 << 24;
    let number = |text: &str, radix| u64::from_str_radix(text.trim(), radix).unwrap_or(0);
    let text =
        |path: &str| String::from_utf8_lossy(&bounded(Path::new(path), 64 << 10)).into_owned();
    let status = text("/proc/self/status");
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    number(&text("/proc/sys/fs/pipe-max-size"), 10) >= WANTED
        || number(capabilities.unwrap_or("0"), 16) & SYS_RESOURCE != 0
}

/// The last lines that say what is wrong.
fn complaint(output: &str) -> String {
    let errors: Vec<&str> = output
        .lines()
        .filter(|line| line.contains("Error"))
        .collect();
    let lines = if errors.is_empty() {
        output.lines().collect()
    } else {
        errors
    };
    let text = lines[lines.len().saturating_sub(3)..].join("; ");
    if text.trim().is_empty() {
        "`criu check` failed without a word".into()
    } else {
        text
    }
}

async fn runtime(name: &'static str) -> Option<Runtime> {
    let path = in_path(name)?;
    let answer = ask(&path, &["--version"]).await;
    let version = answer.and_then(|answer| Version::find(&answer.output));
    Some(Runtime {
        name: name.to_owned(),
        path,
        version,
    })
}

/// Where Podman looks for runtimes unless it is told (containers/common, `pkg/config/default.go`);
/// a service's search path can be shorter.
pub(crate) const DIRECTORIES: [&str; 6] = [
    "/usr/bin",
    "/usr/sbin",
    "/usr/local/bin",
    "/usr/local/sbin",
    "/sbin",
    "/bin",
];

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .chain(DIRECTORIES.map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Where the dynamic linker finds a library: its cache, then its built-in directories (ld.so(8)).
fn library(name: &str, root: &Path) -> Option<PathBuf> {
    let cache = bounded(&root.join("etc/ld.so.cache"), 16 << 20);
    let cached = cached(&cache, name).into_iter();
    let machine = format!("{}-linux-gnu", std::env::consts::ARCH);
    let directories = ["lib", "usr/lib", "lib64", "usr/lib64", "usr/local/lib"];
    let built_in = directories.iter().flat_map(|directory| {
        let directory = Path::new("/").join(directory);
        [directory.join(&machine).join(name), directory.join(name)]
    });
    cached
        .chain(built_in)
        .find(|path| root.join(path.strip_prefix("/").unwrap_or(path)).is_file())
}

/// The paths in the linker's cache that end in this name. The cache is a table with a heap of
/// NUL-terminated strings behind it; a path is one of them.
fn cached(cache: &[u8], name: &str) -> Vec<PathBuf> {
    let ending = format!("/{name}");
    cache
        .split(|byte| *byte == 0)
        .filter_map(|text| std::str::from_utf8(text).ok())
        .filter_map(|text| text.find('/').map(|begin| &text[begin..]))
        .filter(|text| text.ends_with(&ending))
        .map(PathBuf::from)
        .collect()
}

fn bounded(path: &Path, limit: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        // What could be read is what there is.
        let _ = file.take(limit).read_to_end(&mut bytes);
    }
    bytes
}

/// The flags of the first processor (`flags` on x86, `Features` on ARM): a process may run on any.
fn cpu_flags(cpuinfo: &[u8]) -> BTreeSet<String> {
    let text = String::from_utf8_lossy(cpuinfo);
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| ["flags", "Features"].contains(&key.trim()))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn this_host_has_features_and_they_cross_the_wire() {
        let features = Features::of_this_host().await;
        assert!(features.kernel > Version::new(3, 0), "{features:?}");
        assert!(!features.architecture.is_empty());
        let text = serde_json::to_string(&features).expect("written");
        assert_eq!(
            serde_json::from_str::<Features>(&text).expect("read"),
            features
        );
    }

    #[test]
    fn flags_are_those_of_the_first_processor() {
        let x86 = b"processor\t: 0\nvendor_id\t: X\nflags\t\t: fpu sse avx2\nvmx flags\t: ept\n\n\
                    processor\t: 1\nflags\t\t: fpu\n";
        assert_eq!(
            cpu_flags(x86),
            ["avx2", "fpu", "sse"].map(str::to_owned).into()
        );
        let arm = b"processor\t: 0\nFeatures\t: fp asimd\n";
        assert_eq!(cpu_flags(arm), ["asimd", "fp"].map(str::to_owned).into());
        assert!(cpu_flags(b"processor: 0\n").is_empty());
    }

    #[test]
    fn a_library_is_found_in_the_cache_and_beside_it() {
        let root = tempfile::tempdir().expect("a directory");
        let here = |path: &str| root.path().join(path);
        assert_eq!(library("libcriu.so.2", root.path()), None);
        std::fs::create_dir_all(here("opt/x")).expect("made");
        std::fs::create_dir_all(here("etc")).expect("made");
        std::fs::write(here("opt/x/libcriu.so.2"), "").expect("written");
        // Found by path alone, not by being somewhere.
        assert_eq!(library("libcriu.so.2", root.path()), None);
        let cache = b"glibc-ld.so.cache1.1\x01\x02libcriu.so.2\0/gone/libcriu.so.2\0\
                      \xff\0/opt/x/libcriu.so.2\0/opt/x/libcriu.so.2.0\0";
        std::fs::write(here("etc/ld.so.cache"), cache).expect("written");
        assert_eq!(
            library("libcriu.so.2", root.path()),
            Some(PathBuf::from("/opt/x/libcriu.so.2"))
        );
        std::fs::remove_file(here("etc/ld.so.cache")).expect("removed");
        std::fs::create_dir_all(here("usr/lib64")).expect("made");
        std::fs::write(here("usr/lib64/libcriu.so.2"), "").expect("written");
        assert_eq!(
            library("libcriu.so.2", root.path()),
            Some(PathBuf::from("/usr/lib64/libcriu.so.2"))
        );
    }

    #[test]
    fn complaints_are_the_error_lines() {
        let output = "Warn  (x.c:1): dull\nError (criu/cr-check.c:5): no such thing\n";
        assert_eq!(
            complaint(output),
            "Error (criu/cr-check.c:5): no such thing"
        );
        assert_eq!(complaint("only this\n"), "only this");
        assert!(!complaint("").is_empty());
    }
}
