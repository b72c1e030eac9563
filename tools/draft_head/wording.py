"""The first words of user turns, and the wording of instructions. The model writes the rest.

In the lists of words `|` stands between two entries.
"""

from __future__ import annotations


def _entries(text: str) -> tuple[str, ...]:
    return tuple(entry for line in text.strip().splitlines() for entry in line.strip().strip("|").split("|"))


#: Writing, role play, code, extraction, science, history, reasoning, planning, rewriting.
SEEDS = _entries(
    """
    Write|Write a short|Write an email|Compose|Compose an email to|Draft a|Create a|Describe|Explain|Explain how|
    How do|How can I|How does|Why|Why do|What are the|What would happen if|Give me|List|Suggest|Help me|
    Tell me about|Can you|I want to|I need|I am|My|Please|Could you|Imagine you are|Pretend to be|You are a|Act as|
    Take the role of|As a|Let's play|Write a poem|Write a story|Write a blog post|Write a review|Write a speech|
    Write a dialogue between|Write a Python function|Write a program that|Implement|Fix the bug in this code:|
    What does this code do?|Here is a function:|Write a SQL query|In Java|Extract the|
    Given the following text, list|Classify|From the sentence below|Sort these|Identify the|Which of these|
    What is the capital|In physics,|What is the difference between|Explain the process of|In chemistry,|
    Why is the sky|Define|How did the|What caused the|Discuss the|Compare|Analyze|Who was|In which century|
    What were the consequences of|If|If all|Is it true that|Which is heavier|There are three|Suppose|Solve|
    Calculate|What comes next|A man|Plan a|Outline|Rewrite|Correct the grammar|Paraphrase|Make this sentence|
    Design a|Develop|Evaluate|Do you|Should I|Recommend
    """
)
QUESTION_SEEDS = _entries(
    """
    Who|Who wrote|Who is the|Who was the first|Who sings|Who played|Where is|Where was|Where did|Where does|When is|
    When did|When was|What is|What is the name of|What was|What year did|What kind of|What type of|What does|
    What country|Which|How many|How long|How old|How much|How tall|In what year|Why was|Who won the|Where do|
    When does|What are|Which city|Who invented
    """
)
MATH_SEEDS = _entries(
    """
    A train|A farmer|A shop|John has|Sarah buys|Tom|Maria|If a|If it takes|There are|A box contains|A school|
    Emma saves|A bakery|Lisa has twice as many|James earns|In a class of|A rectangle|Anna and Ben|A car travels|
    Each|Mr. Brown|A recipe|Kevin reads|Olivia|The price of|A tank|Sam is|Two|Calculate|What is|Find the|
    Solve for x:|A company|Every week|On Monday,|David|Nina
    """
)
#: Empty: anything.
SECOND_SEEDS = ("", "", *_entries("Can you|Now|What|Why|How|Rewrite|Thanks|And|Give|Make it|Explain|But"))
TRANSLATE = ("Translate {language} to English: ",) * 3 + (
    "Translate to English: ",
    "Translate the following {language} sentence into English: ",
    "What does this {language} sentence mean in English? ",
)
#: How sentences begin, by language.
STARTS = {
    "German": _entries(
        """
        Der|Die|Das|Ein|Eine|Im|In|Ich|Wir|Er|Sie|Es|Nach|Am|Bei|Mit|Auf|Für|Aber|Wenn|Seit|Vor|Nur|Alle|Als|Diese|
        Dieser|In der|In den|Auch|So|Heute|Der neue|Die Stadt|Von|Zum|Unter|Durch|Zwei|Viele|Nicht|Dort|Man|Bereits|
        Das neue|Gestern
        """
    ),
    "French": _entries("Le|La|Les|Un|Une|Je|Nous|Il|Elle|Dans|Après|Pour|C'est|Mon"),
    "Spanish": _entries("El|La|Los|Un|Una|Me|Nosotros|En|Es|Mi|Cuando|Para|Hay|Ayer"),
    "Italian": _entries("Il|La|Un|Una|Sono|Nel|Mi|Ho|Questo|Quando|Per|È"),
    "Portuguese": _entries("O|A|Os|Um|Uma|Eu|Nós|Em|Quando|Hoje|Para"),
    "Dutch": _entries("De|Het|Een|Ik|Wij|In|Er|Na|Voor|Dit"),
}
#: How passages begin: news, encyclopedia, biography, sports, science, places, tales.
PASSAGE_SEEDS = _entries(
    """
    LONDON -|NEW YORK (AP) -|WASHINGTON -|By|A man|A woman|Two|Police|The family of|A court|Scientists|Researchers at|
    The government|The president|Hundreds of|A new study|It was|When|After|He was|She was|In|In 19|In 20|On Monday|
    On Saturday|Last week|Last year|For years|According to|Officials|A former|The company|One of the|More than|Nearly|
    With|As|At the|From|During the|By the|The|The first|The city of|The history of|The name|The term|The film|The song|
    The series|The novel|The band|The album|The team|The game|The match|The season|The World|The United States|
    The British|The German|The French|The Roman|The National|The University of|The river|The island|The war|
    The battle of|The constitution|The human|The heart|The theory of|The population of|The economy of|The main|
    The oldest|The largest|King|Queen|Sir|Dr.|Saint|Lake|Mount|San|North|South|John|James|William|Robert|David|Michael|
    Thomas|George|Mary|Anna|Elizabeth|Maria|Charles|Henry|Paul|Peter|Alexander|Manchester|Chicago|California|India|
    China|Africa|Australia|Canada|Germany|Japan|Mexico|Italy|Texas|Paris|A|An|There|This|It|They|We|I|My
    """
)
#: What stands before a passage, and what behind it.
SUMMARIZE = (("Summarize: ", ""),) * 5 + (
    ("Summarize the following text.\n\n", ""),
    ("", "\n\nSummarize the text above in a few sentences."),
    ("Write a short summary of this article:\n", ""),
    ("What are the main points of the following?\n\n", ""),
)
#: What stands before the passages, and what between the last one and the question.
PASSAGE_QA = (("", "\n"),) * 4 + (
    ("Answer the question from the passage.\n\n", "\n\nQuestion: "),
    ("", "\n\nQuestion: "),
    ("Read the text and answer the question.\n", "\n"),
)
PASSAGE_QUESTION_SEEDS = (
    "Who",
    "What",
    "What is",
    "Where",
    "When",
    "How many",
    "Which",
    "What was",
    "When did",
    "Who is",
)
