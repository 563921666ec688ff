//! What a program may still take of the host's memory.

/// Where the system shows control groups.
const GROUPS: &str = "/sys/fs/cgroup";

/// Bytes of the host's memory that a program may still take: what the system has available, within the limits of the program's
/// control group and of those that this one is in, such as a batch job's (Linux; `None` elsewhere).
pub fn host_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let line = read("/proc/meminfo")?.lines().find_map(|line| Some(line.strip_prefix("MemAvailable:")?.to_string()))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    Some(left_in_groups(&groups, &read).map_or(kib * 1024, |left| left.min(kib * 1024)))
}

/// The least that is left in any of a process's control groups, of which `/proc/self/cgroup` tells; `None` where none has a limit.
/// Files in the cache, which the system drops when it needs their memory, count as left.
fn left_in_groups(groups: &str, read: &dyn Fn(&str) -> Option<String>) -> Option<u64> {
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let left = |folder: &str, [limit, used, cached]: [&str; 3]| {
        // A group without a limit says "max".
        let limit = number(&format!("{folder}/{limit}"))?;
        let used = number(&format!("{folder}/{used}")).unwrap_or(0);
        let stat = read(&format!("{folder}/memory.stat")).unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix(cached)?.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    };
    const SECOND: [&str; 3] = ["memory.max", "memory.current", "inactive_file "];
    const FIRST: [&str; 3] = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "];
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, files) = match controllers {
            "" => (GROUPS.to_string(), SECOND),
            _ if controllers.split(',').any(|name| name == "memory") => (format!("{GROUPS}/memory"), FIRST),
            _ => return None,
        };
        // A container sees its own group as the root, whatever the path is outside.
        let inner = path.trim_end_matches('/');
        let above = inner.match_indices('/').map(|(end, _)| &inner[..end]);
        above.chain([inner]).filter_map(|path| left(&format!("{root}{path}"), files)).min()
    };
    groups.lines().filter_map(of_line).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_what_its_groups_leave() {
        let of = |groups: &str, files: &[(&str, &str)]| {
            let read = |path: &str| {
                let of = |(name, text): &(&str, &str)| (format!("{GROUPS}/{name}") == path).then(|| text.to_string());
                files.iter().find_map(of)
            };
            left_in_groups(groups, &read)
        };
        // A container, whose group is the root that it sees.
        assert_eq!(of("0::/\n", &[("memory.max", "5000\n"), ("memory.current", "2000\n")]), Some(3000));
        assert_eq!(of("0::/\n", &[("memory.max", "max\n"), ("memory.current", "2000\n")]), None);
        // A step of a Slurm job: the limit is the job's.
        let job = [
            ("slurm/job_7/memory.max", "9000"),
            ("slurm/job_7/memory.current", "8000"),
            ("slurm/job_7/memory.stat", "anon 1000\ninactive_file 7000\n"),
            ("slurm/job_7/step_0/memory.max", "max"),
            ("slurm/memory.max", "100000"),
        ];
        assert_eq!(of("0::/slurm/job_7/step_0\n", &job), Some(8000));
        // The first version of control groups, where each controller has a tree.
        let first = [
            ("memory/slurm/job_7/memory.limit_in_bytes", "4096"),
            ("memory/slurm/job_7/memory.usage_in_bytes", "96"),
            ("memory/memory.limit_in_bytes", "9223372036854771712"),
            ("cpu/slurm/job_7/memory.limit_in_bytes", "1"),
        ];
        assert_eq!(of("5:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7\n0::/user\n", &first), Some(4000));
        assert_eq!(of("", &job), None);
        assert_eq!(of("rubbish\n0::\n", &[]), None);
    }
}
