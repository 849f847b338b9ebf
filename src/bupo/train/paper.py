"""The paper of the method, as model cards cite it."""

PAPER = {
    "title": "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
    "id": "2512.19673",
    "citation": """\
@article{tan2025bupo,
    title        = {{Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies}},
    author       = {Yuqiao Tan and Minzheng Wang and Shizhu He and Huanxuan Liao and Chengfeng Zhao and Qiunan Lu
                    and Tian Liang and Jun Zhao and Kang Liu},
    year         = 2025,
    eprint       = {arXiv:2512.19673},
}""",
}
