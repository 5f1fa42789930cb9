//! What stands in the way of a migration, found before anything is stopped.
//!
//! Each finding has a code that stays the same from version to version, so that scripts can act on
//! it; a sentence that says what is wrong on which host; and one that says what to do. The functions
//! here are pure: they compare what was found out elsewhere.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::processes::Obstacle;
use super::{Features, Version};

macro_rules! codes {
    ($($(#[$doc:meta])+ $name:ident = $text:literal,)+) => {
        /// What kind of obstacle a finding is. Its text never changes once it has been released.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])+ #[serde(rename = $text)] $name,)+
        }

        impl Code {
            /// All codes there are.
            pub const ALL: &'static [Code] = &[$(Code::$name,)+];

            /// The code's text, in lower case with hyphens.
            pub const fn text(self) -> &'static str {
                match self { $(Code::$name => $text,)+ }
            }
        }
    };
}

codes! {
    /// CRIU is not installed.
    CriuMissing = "criu-missing",
    /// This kernel needs a newer CRIU.
    CriuTooOldForKernel = "criu-too-old-for-kernel",
    /// `criu check` is not content with this host.
    CriuCheckFailed = "criu-check-failed",
    /// The destination's CRIU is older than the one that writes the images.
    CriuOlderAtDestination = "criu-older-at-destination",
    /// crun cannot load CRIU's library.
    LibcriuMissing = "libcriu-missing",
    /// The destination would restore with another runtime than the one that dumped.
    RuntimeMismatch = "runtime-mismatch",
    /// The container's runtime is not installed.
    RuntimeMissing = "runtime-missing",
    /// The runtime's versions differ.
    RuntimeVersionDiffers = "runtime-version-differs",
    /// The destination's processor cannot take the registers of the source's.
    CpuFeaturesMissing = "cpu-features-missing",
    /// The destination's processor lacks instructions that programs may have chosen to use.
    CpuFeaturesDiffer = "cpu-features-differ",
    /// The hosts have different architectures.
    ArchitectureMismatch = "architecture-mismatch",
    /// A process uses io_uring.
    IoUringInUse = "io-uring-in-use",
    /// A process has a file open that CRIU does not know.
    FileNotDumpable = "file-not-dumpable",
    /// The container has sockets of a protocol that CRIU does not know.
    SocketNotDumpable = "socket-not-dumpable",
    /// A process is being traced.
    ProcessTraced = "process-traced",
    /// The limits of a process may not be read.
    LimitsNotReadable = "limits-not-readable",
    /// An option stands where it crashes CRIU.
    NetworkLockMisplaced = "network-lock-misplaced",
    /// CRIU would use iptables, which is not installed.
    NetworkLockUnavailable = "network-lock-unavailable",
    /// The destination's kernel is older than the source's.
    KernelOlderAtDestination = "kernel-older-at-destination",
    /// The container's memory does not fit into the destination's.
    MemoryDoesNotFit = "memory-does-not-fit",
    /// The engine that was asked for is not set up.
    EngineUnavailable = "engine-unavailable",
    /// Memory cannot be fetched after the move.
    PostCopyUnavailable = "post-copy-unavailable",
    /// A container whose memory is fetched after the move depends on both hosts until it is there.
    PostCopyRisk = "post-copy-risk",
    /// livemig or Podman does not run as root.
    Rootless = "rootless",

    /// The container does not run.
    NotRunning = "not-running",
    /// The container is part of a pod.
    InPod = "in-pod",
    /// The container depends on other containers.
    DependsOnOthers = "depends-on-others",
    /// The container uses a network that cannot move.
    NetworkMode = "network-mode",
    /// The container shares a namespace.
    SharedNamespace = "shared-namespace",
    /// The container's users are mapped to others.
    UserNamespace = "user-namespace",
    /// The container has no cgroup.
    NoCgroup = "no-cgroup",
    /// The container was not made from an image.
    NoImage = "no-image",
    /// The container's changed files cannot be read.
    StorageDriver = "storage-driver",
    /// A volume is no plain directory.
    VolumeDriver = "volume-driver",
    /// The root directory of a volume will have another owner or mode.
    VolumeRoot = "volume-root",
    /// A mount has a writable layer of its own.
    OverlayMount = "overlay-mount",
    /// An image is mounted into the container.
    ImageMount = "image-mount",
    /// The container was given devices.
    Devices = "devices",
    /// Sessions of `podman exec` end.
    ExecSessions = "exec-sessions",
    /// The timer of a health check does not move.
    HealthCheck = "health-check",
    /// What was logged does not move.
    LogDriver = "log-driver",
    /// A connection will break.
    FlowNotKept = "flow-not-kept",
    /// The destination has a container of this ID.
    IdInUse = "id-in-use",
    /// The destination has a container of this name.
    NameInUse = "name-in-use",
    /// The image's name is that of another image at the destination.
    ImageNameTaken = "image-name-taken",
    /// The container's network cannot be made at the destination.
    SubnetTaken = "subnet-taken",
    /// The destination forwards no packets.
    NotForwarding = "not-forwarding",
    /// The destination's network of that name has other subnets.
    SubnetMismatch = "subnet-mismatch",
    /// The container's address is taken at the destination.
    AddressInUse = "address-in-use",
    /// A published port is taken at the destination.
    PortInUse = "port-in-use",
    /// A published port is bound to an address that the destination does not have.
    PortAddress = "port-address",
    /// The destination has a volume of that name.
    VolumeExists = "volume-exists",
    /// The source of a bind mount is not there at the destination.
    BindSourceMissing = "bind-source-missing",
    /// The source of a bind mount is a symbolic link.
    BindSourceLink = "bind-source-link",
    /// The container has a list of users that Podman made for it.
    UsersMadeByPodman = "users-made-by-podman",
    /// A secret is not there at the destination.
    SecretMissing = "secret-missing",
    /// The destination takes no privileged containers.
    PrivilegedNotAllowed = "privileged-not-allowed",
    /// The destination gives arriving containers no more capabilities than Podman does.
    CapabilitiesNotAllowed = "capabilities-not-allowed",
    /// The destination gives arriving containers no devices.
    DevicesNotAllowed = "devices-not-allowed",
    /// The destination does not let arriving containers have this mounted.
    BindNotAllowed = "bind-not-allowed",
    /// The destination gives arriving containers no secrets.
    SecretNotAllowed = "secret-not-allowed",
    /// The destination wants arriving containers confined.
    UnconfinedNotAllowed = "unconfined-not-allowed",
    /// The destination shares no namespaces with arriving containers.
    NamespaceNotAllowed = "namespace-not-allowed",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text())
    }
}

/// Whether a finding stops the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// It may work. The operator should know.
    Warn,
    /// It cannot work, or would harm.
    Refuse,
}

/// Which host a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The host that the container leaves.
    Source,
    /// The host that it goes to.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Side::Source => "the source",
            Side::Destination => "the destination",
        })
    }
}

/// Something that stands in the way, or may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Its kind.
    pub code: Code,
    /// Whether it stops the migration.
    pub severity: Severity,
    /// What is wrong, as a sentence without its full stop.
    pub what: String,
    /// What to do about it, likewise.
    pub next: String,
}

impl Finding {
    /// A finding that stops the migration.
    pub fn refuse(code: Code, what: impl Into<String>, next: impl Into<String>) -> Finding {
        Finding {
            code,
            severity: Severity::Refuse,
            what: what.into(),
            next: next.into(),
        }
    }

    /// Whether it stops the migration.
    pub fn refuses(&self) -> bool {
        self.severity == Severity::Refuse
    }

    /// A finding that the operator should know about.
    pub fn warn(code: Code, what: impl Into<String>, next: impl Into<String>) -> Finding {
        Finding {
            code,
            severity: Severity::Warn,
            what: what.into(),
            next: next.into(),
        }
    }
}

/// From this kernel on CRIU needs to be [`CRIU_FOR_NEW_KERNEL`]: dumping a TCP socket asks for a
/// socket option that newer kernels refuse (criu#2705).
const NEW_KERNEL: Version = Version::new(6, 16);
/// The first CRIU that knows [`NEW_KERNEL`].
const CRIU_FOR_NEW_KERNEL: Version = Version::new(4, 2);

/// Examines one host, for a container of this runtime (`crun` or `runc`).
pub fn host(side: Side, features: &Features, runtime: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !features.root {
        findings.push(Finding::refuse(
            Code::Rootless,
            format!("livemig does not run as root at {side}"),
            "run it as root: CRIU cannot checkpoint or restore containers without",
        ));
    }
    findings.extend(criu(side, features));
    match features.runtime(runtime) {
        None => findings.push(Finding::refuse(
            Code::RuntimeMissing,
            format!("{side} has no {runtime}, which runs the container"),
            format!("install {runtime} at {side}"),
        )),
        Some(_) if runtime == "crun" && features.libcriu.is_none() => {
            findings.push(Finding::refuse(
                Code::LibcriuMissing,
                format!("crun at {side} cannot use CRIU: libcriu.so.2 is not installed"),
                format!("install it at {side} (the package libcriu2 on Debian)"),
            ));
        }
        Some(_) => {}
    }
    findings.extend(network_lock(side, features));
    findings
}

fn criu(side: Side, features: &Features) -> Option<Finding> {
    let Some(criu) = &features.criu else {
        return Some(Finding::refuse(
            Code::CriuMissing,
            format!("CRIU is not installed at {side}"),
            format!("install the package criu at {side}"),
        ));
    };
    if features.kernel >= NEW_KERNEL && criu.version < CRIU_FOR_NEW_KERNEL {
        return Some(Finding::refuse(
            Code::CriuTooOldForKernel,
            format!(
                "CRIU {} at {side} is too old for its kernel {}",
                criu.version, features.kernel_release
            ),
            format!("install CRIU {CRIU_FOR_NEW_KERNEL} or newer at {side}"),
        ));
    }
    let complaint = criu.complaint.as_ref()?;
    Some(Finding::warn(
        Code::CriuCheckFailed,
        format!("`criu check` is not content with {side}: {complaint}"),
        format!("run `criu check` at {side} and see whether the container needs what is missing"),
    ))
}

fn network_lock(side: Side, features: &Features) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lock = &features.network_lock;
    for file in &lock.misplaced {
        let file = file.display();
        findings.push(Finding::refuse(
            Code::NetworkLockMisplaced,
            format!("`network-lock` stands in {file} at {side}, where it crashes CRIU"),
            format!("move the line from {file} to /etc/criu/default.conf"),
        ));
    }
    let wants_iptables = !matches!(lock.configured.as_deref(), Some("nftables" | "skip"));
    if wants_iptables && !lock.iptables {
        findings.push(Finding::warn(
            Code::NetworkLockUnavailable,
            format!("CRIU at {side} uses iptables unless it is told otherwise, and there is none"),
            format!("write `network-lock nftables` into /etc/criu/default.conf at {side}"),
        ));
    }
    findings
}

/// Compares two hosts, for a container of `runtime` at the source, where Podman's import at the
/// destination would use `destination_runtime`.
pub fn pair(
    source: &Features,
    destination: &Features,
    runtime: &str,
    destination_runtime: &str,
) -> Vec<Finding> {
    if source.architecture != destination.architecture {
        // Everything else follows from it.
        return vec![Finding::refuse(
            Code::ArchitectureMismatch,
            format!(
                "the source is {} and the destination is {}",
                source.architecture, destination.architecture
            ),
            "choose a destination of the same architecture",
        )];
    }
    let mut findings = Vec::new();
    if runtime != destination_runtime {
        findings.push(Finding::refuse(
            Code::RuntimeMismatch,
            format!(
                "the container is run by {runtime}, and the destination would restore it with \
                 {destination_runtime}, which cannot read its images"
            ),
            format!(
                "set `runtime = \"{runtime}\"` under [engine] in /etc/containers/containers.conf \
                 at the destination and restart podman.service there"
            ),
        ));
    } else if let (Some(here), Some(there)) = (
        source.runtime(runtime).and_then(|r| r.version),
        destination.runtime(runtime).and_then(|r| r.version),
    ) && (here.major, here.minor) != (there.major, there.minor)
    {
        findings.push(Finding::warn(
            Code::RuntimeVersionDiffers,
            format!("{runtime} is {here} at the source and {there} at the destination"),
            "use the same version on both if the restore fails",
        ));
    }
    if let (Some(here), Some(there)) = (&source.criu, &destination.criu)
        && (there.version.major, there.version.minor) < (here.version.major, here.version.minor)
    {
        findings.push(Finding::warn(
            Code::CriuOlderAtDestination,
            format!(
                "CRIU is {} at the source and only {} at the destination",
                here.version, there.version
            ),
            "newer CRIU reads older images, but not always the reverse: update the destination's",
        ));
    }
    let minor = |version: Version| (version.major, version.minor);
    if minor(destination.kernel) < minor(source.kernel) {
        findings.push(Finding::warn(
            Code::KernelOlderAtDestination,
            format!(
                "the destination's kernel {} is older than the source's {}",
                destination.kernel_release, source.kernel_release
            ),
            "a program that uses something new of the source's kernel cannot be restored there",
        ));
    }
    findings.extend(cpu(source, destination));
    findings
}

/// Flags that stand for a part of the processor's state that CRIU saves and has to load again
/// (the parts of XSAVE, Intel SDM volume 1, chapter 13): a processor without it cannot.
const STATE: &[&str] = &[
    "fpu", "fxsr", "xsave", "xsaves", "avx", "avx512f", "pku", "ospke", "amx_tile",
];

/// Flags of instructions that programs and C libraries look for when they start, and then use
/// (glibc's `cpu-features.c`). A program that did so ends with SIGILL where they are missing.
/// Names as `/proc/cpuinfo` has them. Any other flag (mitigations, virtualisation, power) is of no
/// consequence to a program.
const INSTRUCTIONS: &[&str] = &[
    "abm",
    "adx",
    "aes",
    "avx2",
    "avx_vnni",
    "bmi1",
    "bmi2",
    "clflushopt",
    "clwb",
    "cx16",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fsrm",
    "gfni",
    "lahf_lm",
    "movbe",
    "movdir64b",
    "movdiri",
    "pclmulqdq",
    "popcnt",
    "pni",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha_ni",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xop",
    "xsavec",
    "xsaveopt",
];

fn cpu(source: &Features, destination: &Features) -> Vec<Finding> {
    let missing: BTreeSet<&str> = source
        .cpu_flags
        .difference(&destination.cpu_flags)
        .map(String::as_str)
        .collect();
    let of = |wanted: &dyn Fn(&str) -> bool| {
        missing
            .iter()
            .copied()
            .filter(|flag| wanted(flag))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let state = of(&|flag| STATE.contains(&flag));
    // On other architectures than x86 every flag is an instruction set.
    let x86 = source.cpu_flags.contains("fpu");
    let instructions = of(&|flag| {
        INSTRUCTIONS.contains(&flag)
            || (flag.starts_with("avx512") && flag != "avx512f")
            || (flag.starts_with("amx_") && flag != "amx_tile")
            || !x86
    });
    let mut findings = Vec::new();
    if !state.is_empty() {
        findings.push(Finding::refuse(
            Code::CpuFeaturesMissing,
            format!(
                "the destination's processor cannot hold the source's registers: it lacks {state}"
            ),
            "choose a destination with the same or a newer processor; between virtual machines, \
             give both the same processor model",
        ));
    }
    if !instructions.is_empty() {
        findings.push(Finding::warn(
            Code::CpuFeaturesDiffer,
            format!(
                "the destination's processor lacks {instructions}: a program that found them when \
                 it started, and uses them, will crash there"
            ),
            "choose a destination with the same or a newer processor, or try a container whose \
             loss can be borne first",
        ));
    }
    findings
}

/// Says what CRIU cannot dump of these processes: one finding for each kind of it.
pub fn processes(obstacles: &[(u32, Obstacle)]) -> Vec<Finding> {
    let mut kinds: Vec<(Code, u32, &Obstacle, usize)> = Vec::new();
    for (pid, obstacle) in obstacles {
        let code = match obstacle {
            Obstacle::IoUring => Code::IoUringInUse,
            Obstacle::File(_) => Code::FileNotDumpable,
            Obstacle::Traced { .. } => Code::ProcessTraced,
            Obstacle::Limits { .. } => Code::LimitsNotReadable,
        };
        match kinds.iter_mut().find(|(known, ..)| *known == code) {
            Some((.., others)) => *others += 1,
            None => kinds.push((code, *pid, obstacle, 0)),
        }
    }
    let kinds = kinds.into_iter();
    kinds
        .map(|(code, first, obstacle, others)| {
            let others = match others {
                0 => String::new(),
                1 => " and one more".into(),
                others => format!(" and {others} more"),
            };
            let who = format!("process {first}{others} of the container");
            match obstacle {
                Obstacle::IoUring => Finding::refuse(
                    code,
                    format!("{who} uses io_uring, which CRIU cannot dump"),
                    "switch io_uring off in the application, or for the whole host with \
                     `sysctl kernel.io_uring_disabled=2` before the container starts",
                ),
                Obstacle::File(kind) => Finding::refuse(
                    code,
                    format!("{who} has a file open that CRIU cannot dump: {kind}"),
                    "have the application close it first, or do without",
                ),
                Obstacle::Traced { by } => Finding::refuse(
                    code,
                    match by {
                        0 => format!("{who} is being traced, and CRIU has to trace it itself"),
                        by => format!("{who} is traced by {by}, and CRIU has to trace it itself"),
                    },
                    "end the debugger or tracer first",
                ),
                Obstacle::Limits { user } => Finding::refuse(
                    code,
                    format!(
                        "{who} belongs to user {user}, and root here lacks CAP_SYS_RESOURCE, without \
                         which CRIU cannot read its limits"
                    ),
                    "give Podman's service and livemig that capability (this host looks like a \
                     container itself), or run the container's processes as root",
                ),
            }
        })
        .collect()
}

/// Says that there are sockets of these protocols; nothing if there are none.
pub fn sockets(protocols: &[&str]) -> Option<Finding> {
    let first = protocols.first()?;
    let next = match *first {
        "MPTCP" | "MPTCPv6" => {
            "have it use plain TCP: `GODEBUG=multipathtcp=0` for programs in Go, or \
             `sysctl net.mptcp.enabled=0` in the container (--sysctl)"
        }
        _ => "have the application close them first, or do without",
    };
    Some(Finding::refuse(
        Code::SocketNotDumpable,
        format!(
            "the container has sockets of {}, which CRIU cannot dump",
            protocols.join(" and ")
        ),
        next,
    ))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{Criu, NetworkLock, Runtime};
    use super::*;

    fn good() -> Features {
        let flags = [
            "fpu", "fxsr", "sse4_2", "avx", "avx2", "xsave", "vmx", "md_clear",
        ];
        Features {
            architecture: "x86_64".into(),
            kernel_release: "6.18.4-test".into(),
            kernel: Version {
                major: 6,
                minor: 18,
                patch: 4,
            },
            criu: Some(Criu {
                version: Version {
                    major: 4,
                    minor: 2,
                    patch: 1,
                },
                complaint: None,
                dirty_tracking: true,
                lazy_pages: true,
                pagemap_scan: true,
                nftables_lock: true,
            }),
            libcriu: Some("/lib/libcriu.so.2".into()),
            runtimes: ["crun", "runc"]
                .map(|name| Runtime {
                    name: name.into(),
                    path: PathBuf::from("/usr/bin").join(name),
                    version: Some(Version::new(1, 28)),
                })
                .into(),
            network_lock: NetworkLock {
                configured: Some("nftables".into()),
                misplaced: Vec::new(),
                iptables: false,
            },
            cpu_flags: flags.map(str::to_owned).into(),
            root: true,
        }
    }

    fn found(findings: impl IntoIterator<Item = Finding>) -> Vec<(Code, Severity)> {
        findings
            .into_iter()
            .map(|f| {
                assert!(!f.what.is_empty() && !f.next.is_empty());
                assert!(!f.what.ends_with('.') && !f.next.ends_with('.'), "{f:?}");
                (f.code, f.severity)
            })
            .collect()
    }

    /// What one change to a good host makes of it.
    fn alone(runtime: &str, change: impl FnOnce(&mut Features)) -> Vec<(Code, Severity)> {
        let mut features = good();
        change(&mut features);
        found(host(Side::Source, &features, runtime))
    }

    /// What one change to the destination makes of a good pair.
    fn together(change: impl FnOnce(&mut Features)) -> Vec<(Code, Severity)> {
        let mut destination = good();
        change(&mut destination);
        found(pair(&good(), &destination, "crun", "crun"))
    }

    use Severity::{Refuse, Warn};

    #[test]
    fn good_hosts_have_no_findings() {
        assert_eq!(alone("crun", |_| {}), []);
        assert_eq!(together(|_| {}), []);
    }

    #[test]
    fn each_lack_has_its_code() {
        assert_eq!(
            alone("runc", |f| f.root = false),
            [(Code::Rootless, Refuse)]
        );
        assert_eq!(
            alone("runc", |f| f.criu = None),
            [(Code::CriuMissing, Refuse)]
        );
        let old = |f: &mut Features| {
            f.criu.as_mut().expect("there").version = Version {
                major: 4,
                minor: 1,
                patch: 1,
            };
        };
        assert_eq!(alone("runc", old), [(Code::CriuTooOldForKernel, Refuse)]);
        let both_old = |f: &mut Features| {
            old(f);
            f.kernel = Version::new(6, 15);
        };
        assert_eq!(alone("runc", both_old), []);
        let complaint = |f: &mut Features| {
            f.criu.as_mut().expect("there").complaint = Some("Error: x".into());
        };
        assert_eq!(alone("runc", complaint), [(Code::CriuCheckFailed, Warn)]);
        assert_eq!(
            alone("crun", |f| f.libcriu = None),
            [(Code::LibcriuMissing, Refuse)]
        );
        assert_eq!(alone("runc", |f| f.libcriu = None), []);
        assert_eq!(alone("kata", |_| {}), [(Code::RuntimeMissing, Refuse)]);
        let misplaced = |f: &mut Features| {
            f.network_lock.misplaced = vec!["/etc/criu/runc.conf".into()];
        };
        assert_eq!(
            alone("runc", misplaced),
            [(Code::NetworkLockMisplaced, Refuse)]
        );
        let unset = |f: &mut Features| f.network_lock.configured = None;
        assert_eq!(alone("runc", unset), [(Code::NetworkLockUnavailable, Warn)]);
        let with_iptables = |f: &mut Features| {
            unset(f);
            f.network_lock.iptables = true;
        };
        assert_eq!(alone("runc", with_iptables), []);
    }

    #[test]
    fn each_difference_has_its_code() {
        assert_eq!(
            together(|f| f.architecture = "aarch64".into()),
            [(Code::ArchitectureMismatch, Refuse)]
        );
        assert_eq!(
            found(pair(&good(), &good(), "crun", "runc")),
            [(Code::RuntimeMismatch, Refuse)]
        );
        assert_eq!(
            together(|f| f.runtimes[0].version = Some(Version::new(1, 20))),
            [(Code::RuntimeVersionDiffers, Warn)]
        );
        assert_eq!(
            together(|f| f.criu.as_mut().expect("there").version = Version::new(4, 0)),
            [(Code::CriuOlderAtDestination, Warn)]
        );
        assert_eq!(
            together(|f| f.kernel = Version::new(6, 12)),
            [(Code::KernelOlderAtDestination, Warn)]
        );
        // A newer kernel, or the same with another patch, is no news.
        assert_eq!(together(|f| f.kernel = Version::new(6, 18)), []);
        assert_eq!(together(|f| f.kernel = Version::new(7, 0)), []);
    }

    #[test]
    fn processors_are_compared_by_what_matters() {
        let lacking = |flags: &'static [&'static str]| {
            together(move |f| f.cpu_flags.retain(|flag| !flags.contains(&flag.as_str())))
        };
        assert_eq!(lacking(&["vmx", "md_clear"]), []);
        assert_eq!(lacking(&["avx2"]), [(Code::CpuFeaturesDiffer, Warn)]);
        assert_eq!(
            lacking(&["avx", "avx2"]),
            [
                (Code::CpuFeaturesMissing, Refuse),
                (Code::CpuFeaturesDiffer, Warn)
            ]
        );
        let more = |f: &mut Features| f.cpu_flags.extend(["avx512f".to_owned()]);
        assert_eq!(together(more), []);
    }

    #[test]
    fn what_cannot_be_dumped_names_its_processes() {
        assert_eq!(processes(&[]), []);
        let limits = Obstacle::Limits { user: 101 };
        let found = processes(&[
            (7, Obstacle::IoUring),
            (8, Obstacle::IoUring),
            (8, limits),
            (9, Obstacle::IoUring),
        ]);
        let [ring, limits] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!((ring.code, ring.severity), (Code::IoUringInUse, Refuse));
        assert!(ring.what.contains("process 7 and 2 more"), "{}", ring.what);
        assert_eq!(limits.code, Code::LimitsNotReadable);
        assert!(limits.what.contains("user 101"), "{}", limits.what);
        let sockets = sockets(&["MPTCP", "SCTP"]).expect("a finding");
        assert!(sockets.what.contains("MPTCP and SCTP"), "{}", sockets.what);
    }

    #[test]
    fn codes_are_stable_texts() {
        let texts: BTreeSet<&str> = Code::ALL.iter().map(|code| code.text()).collect();
        assert_eq!(texts.len(), Code::ALL.len(), "no text twice");
        for code in Code::ALL {
            let json = serde_json::to_string(code).expect("written");
            assert_eq!(json, format!("\"{code}\""));
            assert_eq!(serde_json::from_str::<Code>(&json).expect("read"), *code);
            assert!(
                code.text()
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'-'),
                "{code}"
            );
        }
        assert_eq!(
            Code::CriuTooOldForKernel.to_string(),
            "criu-too-old-for-kernel"
        );
    }
}
