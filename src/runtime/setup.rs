//! Putting livemig between Podman and its runtime, and taking it away again.
//!
//! A directory holds, for each runtime, a link of its name to livemig and one to the real program; and a
//! link to where migrations wait for calls. So the wrapper knows everything by the path it was called by.
//! A drop-in for `containers.conf` names the wrapper in front of the real runtime: Podman takes the first
//! that exists, so if livemig is removed the plain runtime is used (`[engine.runtimes]` in
//! containers.conf(5)).

use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Error, Result};
use crate::Config;
use crate::criu::feature::DIRECTORIES;
use crate::podman::HostInfo;

/// The runtimes that can be stood in for.
pub const RUNTIMES: [&str; 2] = ["crun", "runc"];
/// Where Podman looks for drop-ins (containers.conf(5)).
const DROP_IN: &str = "/etc/containers/containers.conf.d/90-livemig.conf";
/// The first line of the drop-in: a file without it is not livemig's.
const MARK: &str = "# Written by `livemig setup`; `livemig setup --remove` takes it away.";
/// The links of one runtime.
#[derive(Debug)]
pub(super) struct Links {
    directory: PathBuf,
    name: String,
}

impl Links {
    /// Those of the wrapper that was called by this path.
    pub(super) fn beside(program: &Path) -> Links {
        Links {
            directory: program.parent().unwrap_or(Path::new("/")).to_owned(),
            name: program
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
        }
    }

    /// The wrapper: livemig under the runtime's name.
    fn wrapper(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The runtime itself.
    pub(super) fn real(&self) -> PathBuf {
        self.directory.join(format!("{}.real", self.name))
    }

    /// Where migrations wait for calls.
    pub(super) fn waiting(&self) -> PathBuf {
        self.directory.join("waiting")
    }
}

/// What `livemig setup` did, or found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// The runtimes that livemig stands in front of.
    pub runtimes: Vec<String>,
    /// The drop-in.
    pub drop_in: PathBuf,
    /// Whether anything was changed.
    pub changed: bool,
}

/// Where the wrappers of this host are.
fn directory(config: &Config) -> PathBuf {
    config.state_dir.join("runtime")
}

/// A directory in which there is nothing but livemig under CRIU's name, for runtimes' search path.
pub(super) fn criu_path(config: &Config) -> PathBuf {
    directory(config).join("path")
}

/// Where migrations on this host wait for calls.
pub fn waiting(config: &Config) -> PathBuf {
    config.run_dir.join("runtime")
}

/// The wrapper of a runtime, if it is set up and Podman uses it.
///
/// Podman's service reads its configuration when it starts: one that started before the set-up does not.
pub fn wrapper(config: &Config, host: &HostInfo) -> Option<PathBuf> {
    let links = links(config, &host.runtime.name);
    let in_place = host.runtime.path == links.wrapper() && links.real().exists();
    (in_place && criu(config).real().exists()).then(|| links.wrapper())
}

/// livemig, under CRIU's name: whichever program has called this, there it is.
pub(super) fn own_program(config: &Config) -> PathBuf {
    criu(config).wrapper()
}

fn criu(config: &Config) -> Links {
    Links {
        directory: criu_path(config),
        name: "criu".to_owned(),
    }
}

fn links(config: &Config, name: &str) -> Links {
    Links {
        directory: directory(config),
        name: name.to_owned(),
    }
}

/// Puts livemig between Podman and the runtimes of this host. Done again, it does nothing.
///
/// # Errors
/// [`Error::NoRuntime`]; [`Error::NotOurs`] where something else is in the way; or when a file cannot be
/// written. Then nothing is left behind.
pub fn install(config: &Config) -> Result<Setup> {
    let drop_in = Path::new(DROP_IN);
    let before = read(drop_in)?;
    if before.as_deref().is_some_and(|text| !is_ours(text)) {
        return Err(Error::NotOurs(drop_in.to_owned()));
    }
    let found: Vec<(Links, PathBuf)> = RUNTIMES
        .iter()
        .filter_map(|name| Some((links(config, name), real(name)?)))
        .collect();
    if found.is_empty() {
        return Err(Error::NoRuntime);
    }
    let real_criu = real("criu").ok_or(Error::NoCriu)?;
    // The last of them is made again after each boot, by whoever waits there first.
    for directory in [directory(config), criu_path(config), waiting(config)] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(Error::file("make", &directory))?;
    }
    let criu = criu(config);
    let mut changed = link(&config.program, &criu.wrapper())?;
    changed |= link(&real_criu, &criu.real())?;
    for (links, real) in &found {
        changed |= link(&config.program, &links.wrapper())?;
        changed |= link(real, &links.real())?;
        changed |= link(&waiting(config), &links.waiting())?;
    }
    // Last: from here on Podman uses what was made before.
    let text = drop_in_text(&found);
    if before.as_deref() != Some(&text) {
        if let Some(parent) = drop_in.parent() {
            std::fs::create_dir_all(parent).map_err(Error::file("make", parent))?;
        }
        write_whole(drop_in, &text)?;
        changed = true;
    }
    Ok(Setup {
        runtimes: found.into_iter().map(|(links, _)| links.name).collect(),
        drop_in: drop_in.to_owned(),
        changed,
    })
}

/// Takes livemig away from between Podman and its runtimes. Done again, it does nothing.
///
/// Containers that were started meanwhile go on: what monitors them remembers the wrapper's path for
/// their end only, and Podman finds the plain runtime by itself.
///
/// # Errors
/// [`Error::NotOurs`] if the drop-in is somebody else's; or when a file cannot be removed.
pub fn remove(config: &Config) -> Result<Setup> {
    let drop_in = Path::new(DROP_IN);
    let before = read(drop_in)?;
    let mut changed = false;
    match &before {
        Some(text) if !is_ours(text) => return Err(Error::NotOurs(drop_in.to_owned())),
        Some(_) => changed |= unlink(drop_in)?,
        None => {}
    }
    let mut runtimes = Vec::new();
    let mut waits = None;
    for name in RUNTIMES {
        let links = links(config, name);
        if unlink(&links.wrapper())? {
            runtimes.push(name.to_owned());
            changed = true;
        }
        changed |= unlink(&links.real())?;
        waits = Some(links.waiting());
    }
    if let Some(link) = waits {
        changed |= unlink(&link)?;
    }
    let criu = criu(config);
    changed |= unlink(&criu.wrapper())?;
    changed |= unlink(&criu.real())?;
    for directory in [criu_path(config), directory(config), waiting(config)] {
        match std::fs::remove_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", directory)(error));
            }
            _ => {}
        }
    }
    Ok(Setup {
        runtimes,
        drop_in: drop_in.to_owned(),
        changed,
    })
}

fn is_ours(text: &str) -> bool {
    text.lines().next() == Some(MARK)
}

fn drop_in_text(found: &[(Links, PathBuf)]) -> String {
    let mut text = format!("{MARK}\n[engine.runtimes]\n");
    for (links, real) in found {
        let quoted = |path: &Path| format!("{:?}", path.to_string_lossy());
        let (name, wrapper, real) = (&links.name, quoted(&links.wrapper()), quoted(real));
        text.push_str(&format!("{name} = [{wrapper}, {real}]\n"));
    }
    text
}

/// The program of this name, where Podman would find it.
fn real(name: &str) -> Option<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.is_file())
}

fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

/// Makes a link, or has it point elsewhere, in one step. Says whether that was needed.
fn link(to: &Path, at: &Path) -> Result<bool> {
    match std::fs::read_link(at) {
        Ok(found) if found == to => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // A file of somebody's.
        Err(_) => return Err(Error::NotOurs(at.to_owned())),
    }
    let new = at.with_extension("new");
    unlink(&new)?;
    symlink(to, &new).map_err(Error::file("make", &new))?;
    std::fs::rename(&new, at).map_err(Error::file("put in place", at))?;
    Ok(true)
}

fn unlink(path: &Path) -> Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::file("remove", path)(error)),
    }
}

/// Podman must never see half of it.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text).map_err(Error::file("write", &new))?;
    std::fs::rename(&new, path).map_err(Error::file("put in place", path))
}
