//! How much memory this process may use: that of its control group, version 1 or 2, or the
//! machine's.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

const GROUPS: &str = "/sys/fs/cgroup";

/// `None` when the system does not say.
pub fn limit() -> Option<u64> {
    let read = |path: &Path| read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| total(&text));
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let group = files(&groups).iter().filter_map(|file| read(file)?.trim().parse().ok()).min();
    machine.into_iter().chain(group).min()
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Where the limits of a process of these groups stand: its own and of each group around it. In a
/// container the path may be the host's, and then the root is the container's group.
fn files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, name) = match controllers {
            "" => (GROUPS.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|one| one == "memory") => {
                (format!("{GROUPS}/memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            files.push(Path::new(&root).join(group).join(name));
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_understood() {
        let v2 = files("0::/kube/pod\n");
        let shown: Vec<_> = v2.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(
            shown,
            [
                "/sys/fs/cgroup/kube/pod/memory.max",
                "/sys/fs/cgroup/kube/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        let v1 = files("12:cpu,cpuacct:/a\n5:memory:/\n1:name=systemd:/b\n");
        assert_eq!(v1, [Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes")]);
        assert_eq!(total("MemTotal:       1024 kB\nMemFree: 1 kB\n"), Some(1 << 20));
        assert!(limit().is_some_and(|bytes| bytes > 1 << 20));
    }
}
