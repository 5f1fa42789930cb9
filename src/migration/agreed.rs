//! Whether what arrives is what was offered.
//!
//! The offer was assessed; Podman restores what the archive says. A source that is honest sends both
//! from the same container. Of one that is not, everything by which the archive could have more of this
//! host than the offer is refused here, before Podman acts on it ([`vetted`](crate::bundle::vetted)).
//!
//! Field names are those of Podman's `ContainerConfig` (`libpod/container_config.go`) and of the OCI
//! runtime specification. Go takes a field's name in either case, and so does this.

use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::arrival::{DEFAULT_CAPABILITIES, Policy, Privilege, is_own, is_plain};
use crate::bundle::splice::DELETED_FILES;
use crate::bundle::vetted::{CONFIG_DUMP, Documents, SPEC_DUMP};
use crate::podman::{Container, HostInfo, Mount};

/// What a container may be here, and what it was offered as.
#[derive(Debug)]
pub(crate) struct Agreed<'a> {
    pub container: &'a Container,
    pub policy: &'a Policy,
    pub host: &'a HostInfo,
}

type Judged = std::result::Result<(), String>;

impl Agreed<'_> {
    /// Compares an archive with the offer.
    ///
    /// # Errors
    /// What it has that was not offered, as the end of a sentence about the archive.
    pub(crate) fn judge(&self, documents: &Documents) -> Judged {
        let read = |name: &str| {
            let text = documents
                .get(name)
                .ok_or_else(|| format!("it has no {name}"))?;
            serde_json::from_slice(text)
                .map(|Folded(value)| value)
                .map_err(|error| format!("its {name} cannot be read: {error}"))
        };
        self.config(&read(CONFIG_DUMP)?)?;
        self.spec(&read(SPEC_DUMP)?)?;
        match documents.get(DELETED_FILES) {
            Some(_) => deleted(&read(DELETED_FILES)?),
            None => Ok(()),
        }
    }

    /// Podman's own description.
    fn config(&self, config: &Value) -> Judged {
        let Agreed {
            container,
            policy,
            host,
        } = self;
        for (field, offered) in [
            ("id", container.id.as_str()),
            ("name", &container.name),
            (
                "rootfsimageid",
                container.image.as_ref().map_or("", |image| image.as_str()),
            ),
            ("rootfsimagename", &container.image_name),
        ] {
            let is = config[field].as_str().unwrap_or_default();
            if is != offered {
                return Err(format!("its {field} is `{is}`, offered was `{offered}`"));
            }
        }
        // What runs programs on the host, shares what is another's, or mounts what is not in the offer.
        for field in [
            "exitcommand",
            "rootfs",
            "rootfs_overlay",
            "pod",
            "namespace",
            "dependencies",
            "ipcnsctr",
            "mountnsctr",
            "netnsctr",
            "pidnsctr",
            "usernsctr",
            "utsnsctr",
            "cgroupnsctr",
            "overlayvolumes",
            "ctrimagevolumes",
            "ctrartifactvolumes",
            "pause",
            "isservice",
            "chroot_directories",
            "hostusers",
            "basehostsfile",
            "base_hosts_file",
            "init_container_type",
        ] {
            absent(config, field)?;
        }
        // Else the runtime would take the network namespace that the other document names.
        if !container.networks.is_empty() && config["createnetns"] != true {
            return Err("it has no network namespace of its own".to_owned());
        }
        if !container.privileged {
            absent(config, "privileged")?;
            absent(config, "mountalldevices")?;
        }
        if !(policy.allows(Privilege::Devices) || container.privileged) {
            absent(config, "cdidevices")?;
            absent(config, "device_host_src")?;
        }
        for field in [
            "staticdir",
            "shmdir",
            "secretspath",
            "logpath",
            "conmonpidfile",
            "pid_file",
            "mounts",
        ] {
            for path in texts(&config[field]) {
                // Logs that go to the journal, or nowhere, have none; else Podman gives them a file of its own.
                if field == "logpath" && path.is_empty() {
                    continue;
                }
                let path = Path::new(path);
                if !is_own(path, container, host) {
                    return Err(format!(
                        "its {field} is {}, outside of what this host's Podman keeps for it",
                        path.display()
                    ));
                }
            }
        }
        for (field, simple) in [
            ("runtime", &["runc", "crun"][..]),
            ("healthlogdestination", &["local", "events_logger"]),
            ("networkmode", &["bridge", "none", "private"]),
            (
                "logdriver",
                &[
                    "k8s-file",
                    "json-file",
                    "journald",
                    "none",
                    "passthrough",
                    "passthrough-tty",
                ],
            ),
        ] {
            for word in texts(&config[field]) {
                if !word.is_empty() && !simple.contains(&word) {
                    return Err(format!("its {field} is `{word}`"));
                }
            }
        }
        for field in ["cgroupparent", "timezone"] {
            for path in texts(&config[field]) {
                if path.split('/').any(|part| part == "..") {
                    return Err(format!("its {field} is `{path}`"));
                }
            }
        }
        let volumes: Vec<&str> = container.volumes().collect();
        let networks: Vec<&str> = container.networks.iter().map(|n| n.name.as_str()).collect();
        let list = |field: &str| config[field].as_array().cloned().unwrap_or_default();
        for volume in list("namedvolumes") {
            offered("volume", volume["volumename"].as_str(), &volumes)?;
        }
        for secret in list("secrets") {
            let names: Vec<&str> = container.secrets.iter().map(String::as_str).collect();
            offered("secret", secret["name"].as_str(), &names)?;
        }
        for secret in config["secret_env"].as_object().into_iter().flatten() {
            let names = &container.environment_secrets;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            offered("secret", secret.1["name"].as_str(), &names)?;
        }
        for field in ["newnetworks", "networks"] {
            let lower: Vec<String> = networks.iter().map(|name| name.to_lowercase()).collect();
            let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
            for (name, _) in config[field].as_object().into_iter().flatten() {
                offered("network", Some(name), &lower)?;
            }
            for name in texts(&config[field]) {
                offered("network", Some(name), &networks)?;
            }
        }
        for port in list("newportmappings").iter().chain(&list("portmappings")) {
            self.port(port)?;
        }
        Ok(())
    }

    fn port(&self, port: &Value) -> Judged {
        /// Podman refuses larger ones: no port has them, and no range is so long.
        const LARGEST: u64 = 0xffff;
        for field in [
            "hostport",
            "containerport",
            "host_port",
            "container_port",
            "range",
        ] {
            if port[field].as_u64().is_some_and(|number| number > LARGEST) {
                return Err(format!("it publishes a port with {field} {}", port[field]));
            }
        }
        let number = |field: &str| port[field].as_u64().unwrap_or(0);
        let (host, inside) = match port.get("hostport") {
            Some(_) => (number("hostport"), number("containerport")),
            None => (number("host_port"), number("container_port")),
        };
        let range = number("range").max(1);
        let protocols = port["protocol"].as_str().unwrap_or("tcp");
        for protocol in protocols.split(',') {
            let fits = self.container.ports.iter().any(|offered| {
                let first = u64::from(offered.host_port);
                offered.protocol == protocol
                    && host >= first
                    && host + range <= first + u64::from(offered.range)
                    && inside + first == host + u64::from(offered.container_port)
            });
            if !fits {
                return Err(format!(
                    "it publishes port {host}/{protocol}, which was not offered"
                ));
            }
        }
        Ok(())
    }

    /// What the runtime is told.
    fn spec(&self, spec: &Value) -> Judged {
        let Agreed {
            container, policy, ..
        } = self;
        let linux = &spec["linux"];
        // Programs that the runtime runs on the host.
        absent(spec, "hooks")?;
        for (name, _) in spec["annotations"].as_object().into_iter().flatten() {
            // They name programs and files on the host to runtimes and to CRIU.
            let harmless = ["killsignal", "timeoutstopusec", "collectmode"];
            let property = name.strip_prefix("org.systemd.property.");
            if name.starts_with("run.oci.")
                || name.starts_with("org.criu.")
                || name.starts_with("io.katacontainers.")
                || property.is_some_and(|property| !harmless.contains(&property))
            {
                return Err(format!("it has the annotation {name}"));
            }
        }
        for field in ["uidmappings", "gidmappings", "intelrdt", "netdevices"] {
            absent(linux, field)?;
        }
        self.namespaces(linux)?;
        for mount in spec["mounts"].as_array().into_iter().flatten() {
            self.mount(mount)?;
        }
        if container.privileged {
            return Ok(());
        }
        let sets = spec["process"]["capabilities"].as_object();
        for capability in sets.into_iter().flatten().flat_map(|(_, set)| texts(set)) {
            let offered = container.capabilities.iter().any(|it| it == capability);
            if !offered && !DEFAULT_CAPABILITIES.contains(&capability) {
                return Err(format!("it has {capability}, which was not offered"));
            }
        }
        if !policy.allows(Privilege::Devices) {
            absent(linux, "devices")?;
            let rules = linux["resources"]["devices"].as_array();
            let rules = rules.into_iter().flatten();
            if rules.into_iter().any(|rule| rule["allow"] == true) {
                return Err("it may use devices, none of which was offered".to_owned());
            }
        }
        if !policy.allows(Privilege::Unconfined) {
            /// Of what Podman hides and protects, what says or does most.
            const HIDDEN: [&str; 3] = ["/proc/kcore", "/proc/keys", "/sys/firmware"];
            const PROTECTED: [&str; 3] = ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq"];
            if !linux["seccomp"]["defaultaction"].is_string()
                || linux["seccomp"]["defaultaction"] == "SCMP_ACT_ALLOW"
            {
                return Err("it has no seccomp filter".to_owned());
            }
            for (field, paths) in [("maskedpaths", HIDDEN), ("readonlypaths", PROTECTED)] {
                let there: Vec<&str> = texts(&linux[field]).collect();
                if let Some(missing) = paths.iter().find(|path| !there.contains(path)) {
                    return Err(format!("{missing} is not among its {field}"));
                }
            }
        }
        Ok(())
    }

    fn namespaces(&self, linux: &Value) -> Judged {
        let given = linux["namespaces"].as_array();
        let given: Vec<(&str, &str)> = given
            .into_iter()
            .flatten()
            .map(|it| {
                let text = |field: &str| it[field].as_str().unwrap_or_default();
                (text("type"), text("path"))
            })
            .collect();
        let shared = self.policy.allows(Privilege::HostNamespaces) || self.container.privileged;
        let own: &[&str] = if shared {
            &["pid", "network", "ipc", "mount"]
        } else {
            &["pid", "network", "ipc", "mount", "uts", "cgroup"]
        };
        for kind in own {
            if !given.iter().any(|(it, _)| it == kind) {
                return Err(format!("it has no {kind} namespace of its own"));
            }
        }
        for (kind, path) in given {
            // That of the network Podman makes anew, where the container has networks.
            let made_anew = kind == "network" && !self.container.networks.is_empty();
            if !path.is_empty() && !made_anew {
                return Err(format!("its {kind} namespace is {path}"));
            }
        }
        Ok(())
    }

    fn mount(&self, mount: &Value) -> Judged {
        let Agreed {
            container,
            policy,
            host,
        } = self;
        let text = |field: &str| mount[field].as_str().unwrap_or_default();
        let (kind, source) = (text("type"), text("source"));
        let destination = Path::new(text("destination"));
        let binds = kind == "bind" || texts(&mount["options"]).any(|o| o == "bind" || o == "rbind");
        if !binds {
            let made = [
                "proc", "tmpfs", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2",
            ];
            return if made.contains(&kind) {
                Ok(())
            } else {
                Err(format!("on {} it mounts a {kind}", destination.display()))
            };
        }
        let source = Path::new(source);
        let volume_root = host.volume_root.clone();
        let volume_root = volume_root.unwrap_or_else(|| host.graph_root.join("volumes"));
        let agreed = is_own(source, container, host)
            || is_init(source, destination, &mount["options"])
            || container.mounts.iter().any(|offered| match offered {
                Mount::Bind {
                    source: s,
                    destination: d,
                    ..
                } => s == source && d == destination && policy.allows_bind(source),
                Mount::Volume {
                    name,
                    destination: d,
                    ..
                } => {
                    d == destination
                        && is_plain(source)
                        && source == volume_root.join(name).join("_data")
                }
                _ => false,
            });
        if agreed {
            Ok(())
        } else {
            Err(format!(
                "it mounts {} on {}, which was not offered",
                source.display(),
                destination.display()
            ))
        }
    }
}

/// Where `--init` puts the program that is then the first process (`ContainerInitPath` in Podman's
/// libpod/define/config.go).
pub(super) const INIT: &str = "/run/podman-init";
/// Where Podman looks for it (`defaultHelperBinariesDir` in containers/common's config_linux.go, and its
/// `FindInitBinary`).
const INITS: [&str; 5] = [
    "/usr/libexec/podman/catatonit",
    "/usr/local/libexec/podman/catatonit",
    "/usr/local/lib/podman/catatonit",
    "/usr/lib/podman/catatonit",
    "/usr/bin/catatonit",
];

/// Whether it is the program for `--init`, which nobody can write to.
fn is_init(source: &Path, destination: &Path, options: &Value) -> bool {
    destination == Path::new(INIT)
        && INITS.iter().any(|path| source == Path::new(path))
        && texts(options).any(|option| option == "ro")
        // The last one counts.
        && !texts(options).any(|option| option == "rw")
}

/// Podman joins these to the container's directory and removes what is there.
fn deleted(list: &Value) -> Judged {
    let list = list.as_array().ok_or("its deleted.files is no list")?;
    for path in list {
        if !path.as_str().is_some_and(|path| is_plain(Path::new(path))) {
            return Err(format!("it deletes {path}"));
        }
    }
    Ok(())
}

/// Whether a field is there with something in it.
fn absent(of: &Value, field: &str) -> Judged {
    let empty = match &of[field] {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Number(number) => number.as_u64() == Some(0),
        Value::Bool(true) => false,
    };
    if empty {
        Ok(())
    } else {
        Err(format!("its {field} is {}", of[field]))
    }
}

fn offered(what: &str, name: Option<&str>, offered: &[&str]) -> Judged {
    match name {
        Some(name) if offered.contains(&name) => Ok(()),
        name => Err(format!(
            "it uses the {what} `{}`, which was not offered",
            name.unwrap_or_default()
        )),
    }
}

/// A text, or the texts in a list.
fn texts(value: &Value) -> impl Iterator<Item = &str> {
    let list = value.as_array().into_iter().flatten();
    value
        .as_str()
        .into_iter()
        .chain(list.filter_map(Value::as_str))
}

/// JSON as Go would understand it: field names in lower case. What two readers could understand in two
/// ways, a name that is there twice, is an error.
#[derive(Debug)]
struct Folded(Value);

impl<'de> Deserialize<'de> for Folded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Fold).map(Folded)
    }
}

struct Fold;

impl<'de> Visitor<'de> for Fold {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Folded(value)) = list.next_element()? {
            all.push(value);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut all = serde_json::Map::new();
        while let Some((name, Folded(value))) = map.next_entry::<String, Folded>()? {
            // Go folds these two letters to `s` and `k` (encoding/json, `foldRune`).
            let name = name.replace('\u{17f}', "s").replace('\u{212a}', "k");
            let name = name.to_lowercase();
            if all.insert(name.clone(), value).is_some() {
                return Err(A::Error::custom(format!("{name} is there twice")));
            }
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::podman::RuntimeInfo;

    /// What Podman 5.8.6 writes of one and the same container; the seccomp filter's list and the copy
    /// of the second in the first are left out.
    const CONFIG: &str = include_str!("testdata/config.dump.json");
    const SPEC: &str = include_str!("testdata/spec.dump.json");
    const INSPECT: &str = include_str!("testdata/inspect.json");

    /// A directory that may be mounted, in place of the one in these.
    struct Scene {
        bind: tempfile::TempDir,
        policy: Policy,
        container: Container,
        host: HostInfo,
    }

    impl Scene {
        fn set() -> Scene {
            let bind = tempfile::tempdir().unwrap();
            let policy = Policy {
                binds: vec![bind.path().to_owned()],
                ..Policy::default()
            };
            let inspect = INSPECT.replace("/srv/b", bind.path().to_str().unwrap());
            let host = HostInfo {
                podman_version: "5.8.6".into(),
                api_version: "5.8.6".into(),
                runtime: RuntimeInfo {
                    name: "runc".into(),
                    path: "/usr/bin/runc".into(),
                    version: String::new(),
                },
                cgroup_manager: "cgroupfs".into(),
                cgroup_version: 2,
                network_backend: "netavark".into(),
                graph_driver: "overlay".into(),
                graph_root: "/var/lib/containers/storage".into(),
                run_root: "/run/containers/storage".into(),
                volume_root: None,
                rootless: false,
                arch: "amd64".into(),
                kernel: String::new(),
                hostname: String::new(),
                apparmor: false,
                selinux: false,
            };
            Scene {
                container: Container::read(&inspect),
                bind,
                policy,
                host,
            }
        }

        fn read(&self, text: &str) -> Value {
            let text = text.replace("/srv/b", self.bind.path().to_str().unwrap());
            serde_json::from_str(&text).unwrap()
        }

        fn judge_texts(&self, config: &[u8], spec: &[u8], deleted: &[u8]) -> Judged {
            let agreed = Agreed {
                container: &self.container,
                policy: &self.policy,
                host: &self.host,
            };
            agreed.judge(&Documents::of(&[
                (CONFIG_DUMP, config),
                (SPEC_DUMP, spec),
                (DELETED_FILES, deleted),
            ]))
        }

        fn judge(&self, config: &Value, spec: &Value) -> Judged {
            let (config, spec) = (config.to_string(), spec.to_string());
            self.judge_texts(config.as_bytes(), spec.as_bytes(), b"[\"/etc/motd\"]")
        }
    }

    #[test]
    fn what_podman_wrote_of_the_container_is_agreed_to() {
        let scene = Scene::set();
        let (config, spec) = (scene.read(CONFIG), scene.read(SPEC));
        assert_eq!(scene.judge(&config, &spec), Ok(()));
        assert_eq!(
            super::super::arrival::forbidden(&scene.policy, &scene.container, &scene.host),
            []
        );
    }

    #[test]
    fn logs_may_go_to_the_journal() {
        let scene = Scene::set();
        let mut config = scene.read(CONFIG);
        set(&mut config, "/logPath", json!(""));
        set(&mut config, "/logDriver", json!("journald"));
        assert_eq!(scene.judge(&config, &scene.read(SPEC)), Ok(()));
    }

    #[test]
    fn whatever_was_not_offered_is_refused() {
        let scene = Scene::set();
        let (config, spec) = (scene.read(CONFIG), scene.read(SPEC));
        let own = config["staticDir"].as_str().unwrap();
        for (at, value) in [
            ("/id", json!("f".repeat(64))),
            ("/name", json!("other")),
            ("/rootfsImageName", json!("localhost/other:latest")),
            ("/exitCommand", json!(["/bin/sh", "-c", "id"])),
            ("/EXITCOMMAND", json!(["/bin/sh", "-c", "id"])),
            ("/rootfs", json!("/")),
            ("/createNetNS", json!(false)),
            ("/privileged", json!(true)),
            ("/logPath", json!("/etc/cron.d/x")),
            ("/staticDir", json!("")),
            ("/logPath", json!(format!("{own}/../../../x"))),
            ("/pid_file", json!("/etc/passwd")),
            ("/conmonPidFile", json!("/etc/passwd")),
            ("/mounts", json!(["/"])),
            ("/runtime", json!("/tmp/runtime")),
            ("/healthLogDestination", json!("/etc")),
            ("/baseHostsFile", json!("/etc/shadow")),
            ("/timezone", json!("../../../etc/shadow")),
            ("/netNsCtr", json!("f".repeat(64))),
            ("/networkMode", json!("host")),
            ("/namedVolumes/0/volumeName", json!("other")),
            ("/newPortMappings/0/host_port", json!(22)),
            ("/newPortMappings/0/range", json!(100)),
            ("/newPortMappings/0/range", json!(u64::MAX)),
            ("/newPortMappings/0/host_port", json!(u64::MAX)),
            ("/newPortMappings/0/container_port", json!(u64::MAX)),
            ("/newNetworks", json!({ "inner": {} })),
            ("/secrets", json!([{ "name": "key" }])),
            ("/ctrImageVolumes", json!([{}])),
        ] {
            let mut other = config.clone();
            set(&mut other, at, value);
            assert!(scene.judge(&other, &spec).is_err(), "{at}");
        }
        for (at, value) in [
            ("/hooks", json!({ "prestart": [{ "path": "/bin/sh" }] })),
            ("/mounts/0/source", json!("/etc")),
            ("/mounts/0/destination", json!("/elsewhere")),
            ("/mounts/1/type", json!("ext4")),
            ("/mounts/1/options", json!(["rbind"])),
            ("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN"])),
            ("/process/capabilities/ambient", json!(["CAP_NET_ADMIN"])),
            ("/linux/namespaces", json!([])),
            ("/linux/namespaces/0/path", json!("/proc/1/ns/pid")),
            ("/linux/namespaces/4/type", json!("pid")),
            ("/linux/devices", json!([{ "path": "/dev/sda" }])),
            ("/linux/resources/devices/0/allow", json!(true)),
            ("/linux/seccomp", json!(null)),
            ("/linux/seccomp/defaultAction", json!("SCMP_ACT_ALLOW")),
            ("/linux/maskedPaths", json!([])),
            ("/linux/readonlyPaths", json!([])),
            (
                "/annotations",
                json!({ "org.criu.config": "/tmp/criu.conf" }),
            ),
            (
                "/annotations",
                json!({ "run.oci.hooks.stdout": "/etc/passwd" }),
            ),
        ] {
            let mut other = spec.clone();
            set(&mut other, at, value);
            assert!(scene.judge(&config, &other).is_err(), "{at}");
        }
    }

    /// Puts a value where the pointer (RFC 6901) leads, the last field new if need be.
    fn set(document: &mut Value, pointer: &str, value: Value) {
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        let parent = document.pointer_mut(parent).expect(pointer);
        match field.parse::<usize>() {
            Ok(index) => parent[index] = value,
            Err(_) => parent[field] = value,
        }
    }

    #[test]
    fn the_program_of_init_is_mounted_to_be_read() {
        let scene = Scene::set();
        let config = scene.read(CONFIG);
        let judge = |source: &str, options: &[&str]| {
            let mut spec = scene.read(SPEC);
            let mount = json!({
                "destination": INIT, "type": "bind", "source": source, "options": options,
            });
            spec["mounts"].as_array_mut().unwrap().push(mount);
            scene.judge(&config, &spec)
        };
        assert_eq!(judge(INITS[0], &["bind", "ro"]), Ok(()));
        for (source, options) in [
            (INITS[0], &["bind"][..]),
            (INITS[0], &["bind", "ro", "rw"]),
            ("/usr/libexec/podman", &["bind", "ro"]),
            ("/etc/shadow", &["bind", "ro"]),
        ] {
            judge(source, options).unwrap_err();
        }
    }

    #[test]
    fn a_bind_mount_needs_the_policy_as_well() {
        let mut scene = Scene::set();
        let (config, spec) = (scene.read(CONFIG), scene.read(SPEC));
        scene.policy = Policy::default();
        let said = scene.judge(&config, &spec).unwrap_err();
        assert!(said.contains("was not offered"), "{said}");
    }

    #[test]
    fn what_two_readers_could_understand_differently_is_refused() {
        let scene = Scene::set();
        let (config, spec) = (scene.read(CONFIG).to_string(), scene.read(SPEC).to_string());
        for twice in [
            r#""name":"web","#,
            r#""NAME":"web","#,
            "\"privi\u{17f}leged\":1,\"PRIVISLEGED\":1,",
        ] {
            let text = config.replacen('{', &format!("{{{twice}"), 1);
            let judged = scene.judge_texts(text.as_bytes(), spec.as_bytes(), b"[]");
            assert!(judged.unwrap_err().contains("twice"), "{twice}");
        }
        let cut = &config.as_bytes()[..config.len() - 1];
        assert!(scene.judge_texts(cut, spec.as_bytes(), b"[]").is_err());
    }

    #[test]
    fn nothing_outside_of_the_container_is_deleted() {
        let scene = Scene::set();
        let (config, spec) = (scene.read(CONFIG).to_string(), scene.read(SPEC).to_string());
        for list in [
            &br#"["/../../etc/passwd"]"#[..],
            br#"["/a/../../b"]"#,
            br#"["etc"]"#,
            br#"[7]"#,
            br#"{}"#,
        ] {
            let judged = scene.judge_texts(config.as_bytes(), spec.as_bytes(), list);
            assert!(judged.is_err(), "{}", String::from_utf8_lossy(list));
        }
    }
}
